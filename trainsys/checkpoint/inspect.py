"""`trainsys ckpt ls`, `inspect`, `verify`: what a checkpoint is and whether it is whole, from files, without torch."""

from __future__ import annotations

import time
from pathlib import Path

from trainsys.checkpoint import manifest as manifests
from trainsys.checkpoint.container import Damaged
from trainsys.checkpoint.folder import Folder, problems
from trainsys.checkpoint.health import health
from trainsys.checkpoint.manifest import Manifest
from trainsys.errors import UserError


def open_checkpoint(path: str | Path) -> Manifest:
    """The manifest of one checkpoint folder; UserError where there is no good one."""
    try:
        return manifests.read(Path(path))
    except Damaged as error:
        raise UserError(f"{error}; `trainsys ckpt ls FOLDER` lists a run's checkpoints") from None


def resolve(path: str | Path) -> Path:
    """A checkpoint, or of a run's checkpoint folder the one that a resume would try first."""
    path = Path(path)
    if (path / manifests.NAME).exists():
        return path
    found, bad = Folder(path).by_trust()
    if not found:
        why = f": {bad[0]}" if bad else ": no step_* folder with a manifest in it"
        raise UserError(f"{path} is no checkpoint and holds no good one{why}")
    return path / found[0][0]


def ls(folder: str | Path) -> str:
    """One line for each checkpoint of a run, oldest first."""
    here = Folder(folder)
    found, bad = here.read_all()
    if not found and not bad:
        raise UserError(f"{folder}: no checkpoints here; a run's are in <telemetry.out>/checkpoints/<name>")
    latest = here.latest()
    lines = [
        f"{'checkpoint':<20} {'step':>8}  {'loss':>9}  {'size':>9}  {'saved':<19}  {'health':<8}  layout"
    ]
    for name, m in reversed(found):
        loss = "-" if m.loss is None else f"{m.loss:.4f}"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m.created_s))
        mark = "  <- latest" if name == latest else ""
        lines.append(
            f"{name:<20} {m.step:>8,}  {loss:>9}  {size(m.nbytes):>9}  {when}  "
            f"{here.health(name, m).value:<8}  {layout_text(m)}{mark}"
        )
    lines += [f"damaged: {error}" for error in bad]
    return "\n".join(lines)


def inspect(path: str | Path) -> str:
    """What one checkpoint holds."""
    folder = resolve(path)
    m = open_checkpoint(folder)
    weights = [a for name, a in m.atoms.items() if "@" not in name]
    moments = sorted({name.split("@")[1] for name in m.atoms if "@" in name and not name.startswith("@")})
    count = sum(_elements(a.shape) for a in weights)
    rows = {
        "checkpoint": str(folder),
        "schema": m.schema,
        "step": f"{m.step:,} done, {m.updates:,} updates; batch {m.data_step:,} comes next",
        "loss": "-" if m.loss is None else f"{m.loss:.6f}",
        "health": health(folder, m).value,
        "saved by": f"run {m.run_id or '-'}, attempt {m.attempt}, engine {m.engine}",
        "layout": f"{layout_text(m)} on {m.world} ranks",
        "resumed from": m.resumed_from or "-",
        "model": f"{m.config.get('model', {}).get('name', '?')}: {len(weights)} tensors, {count:,} parameters",
        "moments": ", ".join(moments) or "none",
        "data": str(m.data.get("name", "-")),
        "files": f"{len(m.files)} of {size(m.nbytes)} in all",
    }
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())


def verify(path: str | Path) -> list[str]:
    """Reads every file of one checkpoint, or of all of a run's; one line for each that is not as it was written."""
    path = Path(path)
    if (path / manifests.NAME).exists():
        return _verify_one(path)
    names = Folder(path).names()
    if not names:
        raise UserError(f"{path} is no checkpoint and holds none")
    return [line for name in names for line in _verify_one(path / name)]


def _verify_one(checkpoint: Path) -> list[str]:
    try:
        manifest = manifests.read(checkpoint)
    except Damaged as error:
        return [str(error)]
    return list(problems(checkpoint, manifest))


def layout_text(m: Manifest) -> str:
    parts = [f"{axis}={n}" for axis, n in m.layout.items() if n > 1]
    return " x ".join(parts) or "one process"


def size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
