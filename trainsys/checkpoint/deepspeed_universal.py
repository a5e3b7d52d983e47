"""DeepSpeed's universal checkpoints, in and out; tensor by tensor, and DeepSpeed itself is not needed.

Theirs is a folder a tag, with ``zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`` for each whole parameter, what all have in
common in ``zero/optimizer_state.pt``, and a ``…_model_states.pt`` with counters; ``latest_universal`` beside it names the
newest tag. Parameters have the names of the model that wrote them: canonical ones for ours, and those of the Hugging Face
families are understood as well.
"""

from __future__ import annotations

import io
import math
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.container import Entry, arrange, write_file
from trainsys.checkpoint.durable import sync_dir, write_durable
from trainsys.checkpoint.folder import importing, new_folder
from trainsys.checkpoint.hf import our_name
from trainsys.checkpoint.manifest import Atom, File, Manifest, Part
from trainsys.checkpoint.snapshot import key
from trainsys.errors import UserError
from trainsys.models.boxes import whole

VERSION = 0.4
"""Version of the universal checkpoint format that DeepSpeed 0.19 writes."""
DS_VERSION = "0.19.8"
_STATES = {"": "fp32", "@exp_avg": "exp_avg", "@exp_avg_sq": "exp_avg_sq"}
"""What follows a parameter's name in ours -> the file's name in theirs."""
_GROUPS = 16
"""Their reader stops at the shorter of its parameter groups and the file's. Empty ones leave its settings alone."""
_OURS = ("step", "data_step", "samples", "updates", "loss", "recent_losses", "config", "data", "run_id")


def export(checkpoint: Path, target: Path, *, weights_only: bool = False) -> Path:
    """Write a checkpoint as ``target/global_stepN``; where it is. Holds one tensor in memory at a time.

    ``engine.load_checkpoint(target)`` with ``{"checkpoint": {"load_universal": true}}`` reads it, at any stage of ZeRO
    and any number of ranks. UserError for a target that has files.
    """
    from trainsys.checkpoint.inspect import open_checkpoint

    manifest = open_checkpoint(checkpoint)
    new_folder(target)
    folder = target / f"global_step{manifest.step}"
    reader = AtomReader(checkpoint, manifest)
    step = torch.tensor(0.0 if weights_only else float(manifest.updates))
    for name in sorted(n for n in manifest.atoms if "@" not in n):
        for suffix, file in _STATES.items():
            if name + suffix in reader and not (weights_only and suffix):
                _save({"param": reader.read(name + suffix)}, folder / "zero" / name / f"{file}.pt")
        _save(step, folder / "zero" / name / "step.pt")
    common: dict[str, Any] = {
        "param_groups": [{} for _ in range(_GROUPS)],
        # Stage 3 looks for both inside of this.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
        "ds_version": DS_VERSION,
    }
    _save(common, folder / "zero" / "optimizer_state.pt")
    counters = {
        "module": None,
        "global_steps": manifest.step,
        "global_samples": 0,
        "skipped_steps": manifest.step - manifest.updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": None,
        "ds_version": DS_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
        "trainsys": {name: getattr(manifest, name) for name in _OURS},
    }
    # Stage 3 names the file by the data rank as well, and both look for that of the first.
    for prefix in ("", "zero_pp_rank_0_"):
        _save(counters, folder / f"{prefix}mp_rank_00_model_states.pt")
    write_durable(target / "latest_universal", folder.name.encode())
    sync_dir(target)
    return folder


def _save(what: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(what, buffer)
    write_durable(path, buffer.getvalue())


def import_(source: Path, folder: Path) -> Path:
    """Make a universal checkpoint the first of a new run's checkpoint ``folder``; where it is.

    ``source``: the folder that has ``latest_universal``, or one tag's. Its step is the number of updates, and the
    batch to go on with the one of that number, unless trainsys wrote it and so said more. UserError where it is no
    universal checkpoint, a parameter has no counterpart, or ``folder`` is used.
    """
    tag = _tag(source)
    names = {n: _canonical(n) for n in sorted(p.parent.name for p in tag.glob("zero/*/fp32.pt"))}
    if not names:
        raise UserError(
            f"{source}: no zero/NAME/fp32.pt, so it is no universal checkpoint; make one of a DeepSpeed checkpoint with "
            "deepspeed/checkpoint/ds_to_universal.py"
        )
    header = _header(tag)
    told, shapes = header.get("trainsys", {}), _shapes(header)
    updates = int(told.get("updates", _updates(tag, next(iter(names)))))
    manifest = Manifest(
        step=int(told.get("step", updates)),
        data_step=int(told.get("data_step", updates)),
        samples=told.get("samples"),
        updates=updates,
        loss=told.get("loss"),
        recent_losses=list(told.get("recent_losses", ())),
        config=dict(told.get("config", {})),
        data=dict(told.get("data", {})),
        world=1,
        created_s=time.time(),
        engine="deepspeed",
        resumed_from=str(source),
        files=[],
        atoms={},
    )
    with importing(folder, manifest.step) as (target, saving):
        for number, (theirs, ours) in enumerate(names.items()):
            tensors = dict(_states(tag / "zero" / theirs, ours, shapes.get(theirs)))
            entries = [Entry(key(name, whole(t.shape)), "F32", tuple(t.shape)) for name, t in tensors.items()]
            head, placed = arrange(entries)
            file = f"rank_00000_{number:05d}.safetensors"
            sha256 = write_file(saving / file, head, (_raw(t) for t in tensors.values()))
            manifest.files.append(File(file, (saving / file).stat().st_size, sha256))
            for name, entry in zip(tensors, placed, strict=True):
                manifest.atoms[name] = Atom(
                    "F32", entry.shape, [Part(number, entry.offset, whole(entry.shape))]
                )
        return target.root / target.commit(saving, manifest)


def is_one(source: Path) -> bool:
    """Whether it looks like a universal checkpoint, or a folder of them."""
    return (source / "latest_universal").is_file() or (source / "zero").is_dir()


def _tag(source: Path) -> Path:
    latest = source / "latest_universal"
    return source / latest.read_text(encoding="utf-8").strip() if latest.is_file() else source


def _canonical(name: str) -> str:
    """Ours, of a name that may be Hugging Face's and may come out of a wrapper."""
    name = name.removeprefix("module.")
    return name if name.startswith(("embed.", "layers.", "norm.", "head.")) else our_name(name)


def _states(folder: Path, name: str, shape: tuple[int, ...] | None) -> Iterator[tuple[str, Tensor]]:
    for suffix, file in _STATES.items():
        path = folder / f"{file}.pt"
        if path.is_file():
            held = _load(path)
            tensor = held["param"] if isinstance(held, dict) else held
            if tensor.dim() == 1 and shape is not None:
                tensor = tensor[: math.prod(shape)].view(shape)
            yield name + suffix, tensor.to(torch.float32)


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(tag: Path) -> dict[str, Any]:
    """What the first rank's file says of the run: counters, shapes, and where trainsys wrote it a field of ours."""
    path = next(iter(sorted(tag.glob("*mp_rank_00_model_states.pt"))), None)
    held = None if path is None else _load(path)
    return held if isinstance(held, dict) else {}


def _shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By their names. What comes from stage 3 is flat in its file."""
    groups = header.get("param_shapes") or []
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _updates(tag: Path, name: str) -> int:
    """Stages 1 and 2 tell it of each parameter, stage 3 of all; 0 where nobody does, as with weights alone."""
    own = tag / "zero" / name / "step.pt"
    if own.is_file():
        return int(_load(own))
    common = tag / "zero" / "optimizer_state.pt"
    state = _load(common).get("optimizer_state_dict", {}).get("state", {}) if common.is_file() else {}
    return int(state[0]["step"]) if 0 in state else 0


_KNOWN = {
    ("torch", "Size"),
    ("torch.storage", "UntypedStorage"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "Tensor"),
}


class _Stub:
    """Stands for an object of a class that is not read, such as their loss scaler."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Careful(pickle.Unpickler):
    """Tensors and plain containers only: a checkpoint is not to run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return super().find_class(module, name)
        if module in ("torch._utils", "torch._tensor") and name.startswith("_rebuild_"):
            return super().find_class(module, name)
        if module == "torch" and (
            name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        return _Stub


def _load(path: Path) -> Any:
    careful = SimpleNamespace(Unpickler=_Careful, load=pickle.load, __name__="careful")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=careful)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a file that torch.save wrote, or damaged ({error})") from None
