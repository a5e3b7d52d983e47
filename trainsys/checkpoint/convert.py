"""`trainsys ckpt diff` and `convert`: two checkpoints compared element by element; one rewritten or handed to DCP."""

from __future__ import annotations

from pathlib import Path

import torch

from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.container import Entry, arrange, write_file
from trainsys.checkpoint.folder import Folder, new_folder
from trainsys.checkpoint.inspect import open_checkpoint, resolve
from trainsys.checkpoint.manifest import Atom, File, Part
from trainsys.checkpoint.snapshot import LARGEST_FILE, key
from trainsys.models.boxes import whole


def diff(a: str | Path, b: str | Path) -> list[str]:
    """One line for each atom that differs between two checkpoints of any layouts; empty: equal to the bit.

    Generators of single ranks are left out. Holds one tensor of each in memory.
    """
    left, right = (AtomReader(p, open_checkpoint(p)) for p in (resolve(a), resolve(b)))
    ours, theirs = ({n for n in r.manifest.atoms if not n.startswith("@")} for r in (left, right))
    lines = [f"{name}: only in {left.folder}" for name in sorted(ours - theirs)]
    lines += [f"{name}: only in {right.folder}" for name in sorted(theirs - ours)]
    for field in ("step", "data_step", "updates"):
        if (x := getattr(left.manifest, field)) != (y := getattr(right.manifest, field)):
            lines.append(f"{field}: {x} and {y}")
    for name in sorted(ours & theirs):
        x, y = left.atom(name), right.atom(name)
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            lines.append(f"{name}: {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")
            continue
        one, two = left.read(name), right.read(name)
        if not torch.equal(
            one.view(torch.uint8) if one.dim() else one, two.view(torch.uint8) if two.dim() else two
        ):
            gap = (one.double() - two.double()).abs()
            lines.append(
                f"{name}: {int((gap > 0).sum()):,} of {gap.numel():,} elements differ, by {float(gap.max()):.3g} at most"
            )
    return lines


def convert(source: str | Path, target: str | Path, *, to: str = "whole", weights_only: bool = False) -> Path:
    """Rewrite a checkpoint. ``to``: "whole", in which every tensor is one box, which any reader of safetensors can
    use; or "dcp", a ``torch.distributed.checkpoint`` folder. Where it is. UserError for a target that has files."""
    folder = resolve(source)
    manifest = open_checkpoint(folder)
    reader = AtomReader(folder, manifest)
    names = [n for n in sorted(manifest.atoms) if not n.startswith("@") and not (weights_only and "@" in n)]
    target = Path(target)
    new_folder(target)
    if to == "dcp":
        import torch.distributed.checkpoint as dcp

        # DCP plans over the whole state, so here all of it is in memory at once.
        state = {name: reader.read(name) for name in names}
        dcp.save(state, checkpoint_id=target, no_dist=True)
        return target
    out = Folder(target)
    saving = out.saving(manifest.step, "convert")
    files: list[File] = []
    atoms: dict[str, Atom] = {}
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = _entry(reader, name).nbytes
        if groups[-1] and size + nbytes > LARGEST_FILE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    for number, group in enumerate(groups):
        head, placed = arrange([_entry(reader, name) for name in group])
        path = saving / f"rank_00000_{number:03d}.safetensors"
        sha256 = write_file(path, head, (_raw(reader, name) for name in group))
        files.append(File(path.name, path.stat().st_size, sha256))
        for name, entry in zip(group, placed, strict=True):
            atoms[name] = Atom(entry.dtype, entry.shape, [Part(number, entry.offset, whole(entry.shape))])
    manifest.files, manifest.atoms, manifest.world, manifest.layout = files, atoms, 1, {}
    manifest.lineage = ""  # what trains on from here is another run
    return out.root / out.commit(saving, manifest)


def _entry(reader: AtomReader, name: str) -> Entry:
    atom = reader.atom(name)
    return Entry(key(name, whole(atom.shape)), atom.dtype, atom.shape)


def _raw(reader: AtomReader, name: str) -> memoryview:
    tensor = reader.read(name)
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
