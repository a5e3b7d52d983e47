"""From which checkpoint a run goes on, and bringing its state back under whatever layout the run has now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.compare import model_differences
from trainsys.checkpoint.container import Damaged
from trainsys.checkpoint.folder import Folder, problems
from trainsys.checkpoint.health import Health
from trainsys.checkpoint.manifest import File, Manifest
from trainsys.checkpoint.peers import PeerMemory
from trainsys.checkpoint.ranks import Ranks
from trainsys.config.run import RunConfig
from trainsys.data import order
from trainsys.engines.base import Engine, LocalTensor
from trainsys.errors import UserError
from trainsys.models.shards import ShardSpec

_RNG = "@rng/"
_SUSPECT = "the steps next to it were skipped, and no normal one has followed"


@dataclass(frozen=True)
class Found:
    """A checkpoint that was checked and is good."""

    path: Path
    manifest: Manifest
    notes: list[str] = field(default_factory=list)
    """What was not taken instead of it, or what is to be known of it, one line each."""
    memory: PeerMemory | None = None
    """Where it lies in the memory of the nodes rather than in ``path`` alone."""
    health: Health = Health.UNPROVEN

    @property
    def where(self) -> str:
        return "memory of the nodes" if self.memory else str(self.path)


def find(
    folder: Folder, resume: str, ranks: Ranks, *, restarted: bool = False, memory: PeerMemory | None = None
) -> Found | None:
    """The checkpoint to go on from, the same on every rank; None: start at step 0.

    ``resume``: "auto", "never", or the path of one checkpoint, which begins a run here or is the newest that it has;
    a run that ``restarted``, and the same command once more, go on from their own. A suspect one is taken only where
    there is no other, see docs/checkpoint.md. Every file is read and checked first, shared out over the ranks.
    UserError: the path is no good checkpoint, or something newer is here; "auto" and all that is there is damaged;
    "never" and there is something.
    """
    names = ranks.from_first(folder.names() if ranks.rank == 0 else [])
    if resume == "never" and not restarted:
        if names:
            raise UserError(
                f"{folder.root} holds checkpoints of an earlier run, which this one would mix with; set "
                "checkpoint.resume=auto to go on from them, or another name or checkpoint.folder"
            )
        return None
    notes: list[str] = []
    own = _own(folder, names, ranks, notes, memory)
    if resume not in ("auto", "never") and not (own and (restarted or _began_with(own.manifest, resume))):
        given = _only(Path(resume), ranks)
        if own is not None and own.path.resolve() != given.path.resolve():
            raise UserError(
                f"checkpoint.resume={resume} is step {given.manifest.step}, and {own.where} is newer, at step "
                f"{own.manifest.step}, which going on from there would in time delete; leave checkpoint.resume out to go "
                f"on from step {own.manifest.step}, or choose another name to branch off"
            )
        return given
    if own is None and names:
        raise UserError(
            f"{folder.root}: no checkpoint is good ({'; '.join(notes)}); "
            "name another folder or checkpoint.resume=PATH, or move these away to start anew"
        )
    return own


def _own(
    folder: Folder, names: list[str], ranks: Ranks, notes: list[str], memory: PeerMemory | None
) -> Found | None:
    """The newest good checkpoint of the run that saves in ``folder``, on disk or in memory."""
    found = _newest_good(folder, ranks, notes) if names else None
    if memory is not None:
        kept = memory.newest(ranks.from_first(folder.lineage() if ranks.rank == 0 else ""), ranks)
        if kept is not None and (found is None or _prefer(kept[0], kept[2], found)):
            return Found(kept[1], kept[0], notes, memory, kept[2])
    return found


def _began_with(manifest: Manifest, resume: str) -> bool:
    """Whether the run that saved ``manifest`` was itself told to go on from the path ``resume``."""
    told = manifest.config.get("checkpoint", {}).get("resume", "")
    return bool(told) and Path(told).resolve() == Path(resume).resolve()


def _newest_good(folder: Folder, ranks: Ranks, notes: list[str]) -> Found | None:
    candidates, bad = ranks.on_first(lambda: _listing(folder))
    notes += [f"skipped a damaged checkpoint: {line}" for line in bad]
    for name, manifest, state in candidates:
        wrong = check(folder.root / name, manifest.files, ranks)
        if wrong:
            notes.append(f"skipped a damaged checkpoint: {'; '.join(wrong)}")
            if ranks.rank == 0:
                with suppress(OSError):  # only retention needs the mark
                    folder.mark([name], Health.DAMAGED, manifest.step)
            continue
        if state is Health.SUSPECT:
            notes.append(f"{folder.root / name} is suspect: {_SUSPECT}; there is no better one")
        newer = [(n, m) for n, m, s in candidates if s is Health.SUSPECT and m.serial > manifest.serial]
        notes += [f"skipped checkpoint {n} (step {m.step}): {_SUSPECT}" for n, m in newer]
        return Found(folder.root / name, manifest, notes, health=state)
    return None


def _prefer(copy: Manifest, state: Health, found: Found) -> bool:
    """Whether a copy in memory is better than the checkpoint on disk."""
    mine, other = state is Health.SUSPECT, found.health is Health.SUSPECT
    return (not mine, copy.step) >= (not other, found.manifest.step)


def _listing(folder: Folder) -> tuple[list[tuple[str, Manifest, Health]], list[str]]:
    good, bad = folder.by_trust()
    return [(name, m, folder.health(name, m)) for name, m in good], [str(b) for b in bad]


def _only(path: Path, ranks: Ranks) -> Found:
    def read() -> Manifest:
        try:
            return manifests.read(path)
        except Damaged as error:
            hint = f"; train.init_from={path} starts a new run from weights" if path.is_dir() else ""
            raise UserError(f"checkpoint.resume={path} is not a good checkpoint: {error}{hint}") from None

    answer = ranks.on_first(read)
    if wrong := check(path, answer.files, ranks):
        raise UserError(f"checkpoint.resume={path} is damaged: {'; '.join(wrong)}")
    return Found(path, answer)


def check(checkpoint: Path, files: Sequence[File], ranks: Ranks) -> list[str]:
    """What is wrong with ``files``, each read by one rank; the same lines on every rank."""
    mine = list(files)[ranks.rank :: ranks.world]
    share = Manifest(step=0, data_step=0, updates=0, world=1, files=mine, atoms={})
    return [line for lines in ranks.to_all(list(problems(checkpoint, share))) for line in lines]


def refuse_other_run(found: Found, cfg: RunConfig, data: dict[str, Any]) -> None:
    """UserError where the checkpoint is of another model, is no place in a run at all, is further than the run is to
    go, or is of other data than its cursor can go on in."""
    manifest = found.manifest
    was = manifest.config.get("model")
    if was is not None and (differs := model_differences(was, cfg.model)):
        raise UserError(f"{found.path} is of another model: {'; '.join(line for _, line in differs)}")
    if manifest.updates and not any("@" in name for name in manifest.atoms if not name.startswith("@")):
        raise UserError(
            f"{found.path} holds weights without the optimizer's state, so a run cannot go on from it; "
            f"train.init_from={found.path} starts a new one"
        )
    if manifest.step > cfg.train.steps:
        raise UserError(
            f"{found.path} is step {manifest.step}, but train.steps={cfg.train.steps}; set it to more than "
            f"{manifest.step} to go on, or choose another name to start anew"
        )
    if cfg.checkpoint.changed_data or manifest.data_step == 0:
        return
    if other := order.differences(manifest.config, manifest.data, cfg, data):
        raise UserError(
            f"{found.path}: the order of the data is not this run's ({', '.join(other)}), so its place in "
            "it means nothing; set these back, or checkpoint.changed_data=true to go on all the same"
        )


def load(found: Found, engine: Engine, ranks: Ranks) -> None:
    """Fill the engine's state from a checkpoint of any layout. Where it has no moments (an imported one, before
    any update), those stay zero. UserError where it is of another model; Damaged for a file that changed."""
    manifest = found.manifest
    reader = AtomReader(found.path, manifest)
    state = [t for t in engine.state() if t.name in reader or "@" not in t.name or manifest.updates]
    if found.memory is not None:
        needed = {n for t in state if t.data.numel() for n in reader.files_of(t.name, t.place.bounds)}
        found.memory.bring(manifest, needed, ranks)
    with torch.no_grad():
        for t in state:
            read_tensor(reader, t)
        if found.memory is None:
            _set_rng(reader, ranks)
    engine.resumed(manifest.updates)


def read_tensor(reader: AtomReader, t: LocalTensor, *, cast: bool = False) -> None:
    """Fill this rank's piece of a tensor. UserError where the checkpoint's has another shape; or, unless ``cast``,
    another dtype."""
    if (shape := reader.atom(t.name).shape) != t.place.full_shape:
        raise UserError(f"{reader.folder}: {t.name} is {list(shape)}, the run's is {list(t.place.full_shape)}")
    reader.read_into(t.data, t.name, t.place.bounds, cast=cast)


def rng_state(rank: int) -> Iterator[LocalTensor]:
    """This process's generators. Nothing that a layout shares depends on them, so they belong to the rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for device, state in states.items():
        yield LocalTensor(f"{_RNG}{device}/{rank:05d}", state, ShardSpec.whole(state.shape))


def _set_rng(reader: AtomReader, ranks: Ranks) -> None:
    """A world of another size has other ranks: their generators keep what the run's start gave them."""
    if reader.manifest.world != ranks.world:
        return
    for t in rng_state(ranks.rank):
        if t.name in reader:
            state = reader.read(t.name)
            (torch.cuda.set_rng_state if "/cuda/" in t.name else torch.set_rng_state)(state)
