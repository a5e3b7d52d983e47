"""Between tensors and atoms: who writes which box, and any box read back from whatever boxes were written.

An atom is one canonical tensor of the whole model. A rank holds a box of it (:class:`ShardSpec`); a checkpoint
holds the boxes of the layout that saved it. Reading intersects the two, so no layout needs to know another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainsys.checkpoint.container import ITEM_BYTES, Damaged
from trainsys.checkpoint.manifest import Atom, Manifest
from trainsys.errors import UserError
from trainsys.models.boxes import Box, intersect, shape_of, tile, volume, within

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# Bytes are copied, never converted: an integer of the item's size stands for every dtype, bfloat16 too.
_INTEGERS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16), 4: (np.int32, torch.int32),
             8: (np.int64, torch.int64)}  # fmt: skip

Piece = tuple[str, str, tuple[int, ...], Box]
"""(name, dtype, shape of the full tensor, box of it)."""


def nbytes(piece: Piece) -> int:
    return volume(piece[3]) * ITEM_BYTES[piece[1]]


def assign(by_rank: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """Which of its pieces each rank writes: every box once, and the bytes spread over the ranks that hold it."""
    holders: dict[tuple[str, Box], list[tuple[int, int]]] = {}
    for rank, pieces in enumerate(by_rank):
        for i, (name, _, _, box) in enumerate(pieces):
            if volume(box):
                holders.setdefault((name, box), []).append((rank, i))
    load = [0] * len(by_rank)
    chosen: list[list[int]] = [[] for _ in by_rank]
    # Those with one holder first: they leave no choice.
    for held in sorted(holders.values(), key=len):
        rank, i = min(held, key=lambda h: (load[h[0]], h[0]))
        load[rank] += nbytes(by_rank[rank][i])
        chosen[rank].append(i)
    return [sorted(indices) for indices in chosen]


def check_tiling(by_rank: Sequence[Sequence[Piece]]) -> None:
    """AssertionError if the ranks together do not hold every element of every atom, boxes equal or disjoint."""
    boxes: dict[tuple[str, str, tuple[int, ...]], set[Box]] = {}
    for pieces in by_rank:
        for name, dtype, shape, box in pieces:
            held = boxes.setdefault((name, dtype, shape), set())
            if volume(box):
                held.add(box)
    assert len({name for name, *_ in boxes}) == len(boxes), "ranks disagree on the shape or dtype of an atom"
    for (name, _, shape), held in boxes.items():
        assert tile(shape, held), f"{name}: the ranks' boxes do not tile {shape}"


class AtomReader:
    """Reads any box of any atom of one checkpoint through memory maps: only the pages that are needed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._maps: dict[int, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.atoms

    def read_into(self, target: Tensor, name: str, box: Box, *, cast: bool = False) -> None:
        """Fill ``target``, which is the box ``box`` of atom ``name``. UserError where the two do not fit; ``cast``: of
        another dtype it is converted instead."""
        atom = self.atom(name)
        if DTYPES[target.dtype] != atom.dtype:
            if cast:
                target.copy_(self.read(name, box))
                return
            raise UserError(f"{self.folder}: {name} is {atom.dtype}, the run holds {DTYPES[target.dtype]}")
        assert tuple(target.shape) == shape_of(box), f"{name}: {tuple(target.shape)} for {box}"
        if not target.numel():
            return
        numpy_int, torch_int = _INTEGERS[ITEM_BYTES[atom.dtype]]
        direct = target.device.type == "cpu" and target.is_contiguous()
        staging = target if direct else torch.empty(target.shape, dtype=target.dtype)
        into = staging.detach().view(torch_int).numpy()
        self._fill(into, atom, name, box, numpy_int)
        if not direct:
            target.copy_(staging)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A box of an atom (default: all of it) as a new CPU tensor."""
        atom = self.atom(name)
        box = tuple((0, n) for n in atom.shape) if box is None else box
        out = torch.empty(shape_of(box), dtype=TORCH_DTYPES[atom.dtype])
        self.read_into(out, name, box)
        return out

    def files_of(self, name: str, box: Box) -> set[int]:
        """Numbers of the files that hold something of a box."""
        return {p.file for p in self.atom(name).parts if intersect(p.box, box) is not None}

    def atom(self, name: str) -> Atom:
        if name not in self.manifest.atoms:
            raise UserError(f"{self.folder} holds no {name}: it is of another model")
        return self.manifest.atoms[name]

    def _fill(self, into: np.ndarray, atom: Atom, name: str, box: Box, dtype: type[np.generic]) -> None:
        missing = volume(box)
        item = ITEM_BYTES[atom.dtype]
        for part in atom.parts:
            common = intersect(part.box, box)
            if common is None:
                continue
            data = self._file(part.file)[part.offset : part.offset + volume(part.box) * item]
            if len(data) != volume(part.box) * item:
                raise Damaged(f"{self.folder / self.manifest.files[part.file].name}: cut short")
            source = data.view(dtype) if part.offset % item == 0 else np.frombuffer(data.tobytes(), dtype)
            into[within(common, box)] = source.reshape(shape_of(part.box))[within(common, part.box)]
            missing -= volume(common)
        if missing:
            raise Damaged(f"{self.folder}: {missing} elements of {name} are in no file")

    def _file(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = self.folder / self.manifest.files[number].name
            try:
                self._maps[number] = np.memmap(path, np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise Damaged(f"{path}: {error}") from None
        return self._maps[number]
