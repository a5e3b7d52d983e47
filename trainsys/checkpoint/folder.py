"""The folder of a run's checkpoints: what is there, how one is added, which ones are dropped. No torch here.

``ROOT/step_0000000040/`` holds tensor files and ``manifest.json``; ``ROOT/latest`` names the one to go on from. A
save in progress is ``ROOT/.saving-…``, which no reader looks at. A second checkpoint of the same step (after a fall
back to an older one) is ``step_0000000040.1``: nothing complete is ever replaced.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.container import Damaged, hash_file
from trainsys.checkpoint.durable import make_dir, sync_dir, write_durable
from trainsys.checkpoint.health import Health, health, mark
from trainsys.checkpoint.manifest import Manifest
from trainsys.errors import UserError

LATEST, LINEAGE = "latest", "lineage"
_NAME = re.compile(r"^step_(\d+)(?:\.(\d+))?$")
_SAVING, _DROPPED = ".saving-", ".dropped-"


class Folder:
    """A run's checkpoints under ``root``, which need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        """Names of checkpoint folders that have a manifest, by step."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in self.root.iterdir():
                match = _NAME.match(path.name)
                if match and (path / manifests.NAME).is_file():
                    found.append((int(match[1]), int(match[2] or 0), path.name))
        return [name for *_, name in sorted(found)]

    def read_all(self) -> tuple[list[tuple[str, Manifest]], list[Damaged]]:
        """(name, manifest) newest first, and what could not be read. UserError for a newer schema."""
        good, bad = [], []
        for name in self.names():
            try:
                good.append((name, manifests.read(self.root / name)))
            except Damaged as error:
                bad.append(error)
        return sorted(good, key=lambda item: item[1].serial, reverse=True), bad

    def by_trust(self) -> tuple[list[tuple[str, Manifest]], list[Damaged]]:
        """As :meth:`read_all`, in the order in which a resume tries them: suspect ones after all others."""
        found, bad = self.read_all()
        return sorted(found, key=lambda item: self.health(*item) is Health.SUSPECT), bad

    def health(self, name: str, manifest: Manifest) -> Health:
        return health(self.root / name, manifest)

    def lineage(self, *, new: bool = False) -> str:
        """A name for the run that saves here over all its attempts, made at the first call. By one process.

        ``new``: a run that starts over here gets another one.
        """
        path = self.root / LINEAGE
        if not new:
            with suppress(OSError):
                return path.read_text(encoding="utf-8").strip()
        make_dir(self.root)
        # A run that saved only when it was asked to stop left its name in its checkpoint alone.
        known = [m.lineage for _, m in self.read_all()[0] if m.lineage]
        name = known[0] if known else secrets.token_hex(8)
        write_durable(path, f"{name}\n".encode())
        return name

    def latest(self) -> str | None:
        """What the pointer ``latest`` says; for people and scripts, a resume reads the manifests instead."""
        try:
            return (self.root / LATEST).read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def saving(self, step: int, token: str) -> Path:
        """The folder of a save in progress. Every rank may make it."""
        make_dir(self.root)
        path = self.root / f"{_SAVING}step_{step:010d}-{token}"
        path.mkdir(exist_ok=True)
        return path

    def commit(self, saving: Path, manifest: Manifest) -> str:
        """Turn ``saving``, whose files are durable, into a checkpoint; its name. By one process.

        The manifest is durable before the rename, the rename before ``latest`` moves. ``latest`` stays on a
        checkpoint that is better trusted.
        """
        before = self.names()
        manifest.serial = 1 + max((_serial(self.root / name) for name in before), default=0)
        manifests.write(manifest, saving)  # which syncs ``saving`` itself, with the names of all its files
        name, n = f"step_{manifest.step:010d}", 0
        while (self.root / name).exists():
            n += 1
            name = f"step_{manifest.step:010d}.{n}"
        saving.rename(self.root / name)
        sync_dir(self.root)
        if not (manifest.skipped and before):
            self._point_at(name)
        return name

    def mark(self, names: Sequence[str], state: Health, step: int) -> None:
        """Write down what ``step`` has shown of the checkpoints ``names``; ``latest`` follows. By one process."""
        here = self.names()
        for name in names:
            if name in here:
                mark(self.root / name, state, step)
        if here and not (state is Health.HEALTHY and self.latest() == here[-1]):
            found, _ = self.by_trust()
            if found and found[0][0] != self.latest():
                self._point_at(found[0][0])

    def _point_at(self, name: str) -> None:
        write_durable(self.root / LATEST, f"{name}\n".encode())

    def drop(self, name: str) -> None:
        """Delete a checkpoint. It leaves the list in one step, so a kill cannot leave half of one in it."""
        away = self.root / f"{_DROPPED}{name}"
        (self.root / name).rename(away)
        sync_dir(self.root)
        shutil.rmtree(away, ignore_errors=True)

    def clean(self) -> list[str]:
        """Delete what interrupted saves and drops have left; only where no other run saves here. The names."""
        left = [p for p in _children(self.root) if p.name.startswith((_SAVING, _DROPPED))]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return [p.name for p in left]

    def retain(self, keep_last: int, keep_every: int, keep_best: int) -> list[str]:
        """Drop all but the newest, the newest ``keep_last`` healthy ones, and of healthy ones each multiple of
        ``keep_every`` steps (0: none) and the ``keep_best`` lowest losses; returns what went.

        Where none is healthy, all count as if they were. A damaged one takes nobody's place, and goes only once
        ``keep_last`` newer ones are there. Nothing goes unless a checkpoint that stays is whole: by the size of its
        files, and by their sha256 where it would be the only one.
        """
        found, _ = self.read_all()
        state = {name: self.health(name, m) for name, m in found}
        whole = [
            (name, m)
            for name, m in found
            if state[name] is not Health.DAMAGED and is_whole(self.root / name, m, hashes=False)
        ]
        counted = [(name, m) for name, m in whole if state[name] is Health.HEALTHY] or whole
        keep = {name for name, _ in [*whole[:1], *counted[:keep_last]]}
        keep |= {name for name, m in counted if keep_every and m.step % keep_every == 0}
        scored = sorted((m.loss, name) for name, m in counted if m.loss is not None and m.loss == m.loss)
        keep |= {name for _, name in scored[:keep_best]}
        oldest = counted[keep_last - 1][1].serial if len(counted) >= keep_last else 0
        doomed = [name for name, m in found if name not in keep and ((name, m) in whole or m.serial < oldest)]
        stays = [(name, m) for name, m in whole if name in keep]
        if (
            not doomed
            or not stays
            or (len(stays) == 1 and not is_whole(self.root / stays[0][0], stays[0][1]))
        ):
            return []
        for name in doomed:
            self.drop(name)
        return doomed


def is_whole(checkpoint: Path, manifest: Manifest, *, hashes: bool = True) -> bool:
    return next(problems(checkpoint, manifest, hashes=hashes), None) is None


def new_folder(path: Path) -> None:
    """Make ``path`` for a command's output. UserError where it holds anything or cannot be made."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty folder; name a new one")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from None


@contextmanager
def importing(root: Path, step: int) -> Iterator[tuple[Folder, Path]]:
    """The folder ``root`` of a new run (see `new_run`) and the save in it that becomes its first checkpoint, of ``step``.
    Where the import fails nothing of it stays."""
    target = new_run(root)
    saving = target.saving(step, f"import-{time.time_ns():x}")
    try:
        yield target, saving
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise


def new_run(root: Path) -> Folder:
    """The folder ``root`` for the first checkpoint of a new run. UserError where anything of a run is there, which
    that checkpoint would take the place of."""
    used = [
        p.name for p in _children(root) if p.name != LINEAGE and not p.name.startswith((_SAVING, _DROPPED))
    ]
    if used or (root.exists() and not root.is_dir()):
        what = f"holds {max(used)}" if used else "is no folder"
        raise UserError(
            f"{root} {what}: an import begins a new run, so name a new folder; or train.init_from=DIR starts a run from "
            "weights that are not imported"
        )
    return Folder(root)


def problems(checkpoint: Path, manifest: Manifest, *, hashes: bool = True) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, one line each, naming the file."""
    for file in manifest.files:
        path = checkpoint / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                yield f"{path}: {size} bytes instead of {file.bytes}"
            elif hashes and hash_file(path) != file.sha256:
                yield f"{path}: sha256 does not match the manifest"
        except OSError as error:
            yield f"{path}: {error.strerror}"


def _serial(checkpoint: Path) -> int:
    try:
        return manifests.read(checkpoint).serial
    except Damaged:
        return 0


def _children(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except OSError:
        return []
