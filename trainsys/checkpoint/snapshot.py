"""A copy of this rank's part of the state in host memory, laid out as the files it will become.

The copy is all that a step waits for. The memory is taken once (pinned where there is a CUDA device, so that
the copy runs at the bus's speed) and used again by every save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainsys.checkpoint.atoms import Piece, nbytes
from trainsys.checkpoint.container import ITEM_BYTES, Entry, arrange
from trainsys.checkpoint.lanes import LANES
from trainsys.errors import UserError
from trainsys.layout import words
from trainsys.models.boxes import Box, shape_of
from trainsys.telemetry import text as say

SMALLEST_FILE, LARGEST_FILE = 16 << 20, 256 << 20


def file_bytes(size: int) -> int:
    """About how large the files of a rank's part of ``size`` bytes are: so many that they are hashed side by side."""
    return min(max(size // LANES, SMALLEST_FILE), LARGEST_FILE)


@dataclass(frozen=True)
class Planned:
    """One file of this rank: its head, which part of the snapshot it is, and where each box lies in it."""

    name: str
    head: bytes
    start: int
    stop: int
    parts: list[tuple[Piece, int]]
    """(piece, offset in the file)."""


def key(name: str, box: Box) -> str:
    """How a box is called inside a file."""
    return f"{name}[{','.join(f'{a}:{b}' for a, b in box)}]"


def plan_files(pieces: Sequence[Piece], rank: int, limit: int) -> list[Planned]:
    """The files of ``pieces``, in their order, which must be by falling item size (see ``order``)."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or (size and size + nbytes(piece) > limit):
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += nbytes(piece)
    files, start = [], 0
    for n, group in enumerate(groups):
        head, entries = arrange([Entry(key(p[0], p[3]), p[1], shape_of(p[3])) for p in group])
        stop = start + sum(map(nbytes, group))
        parts = [(p, e.offset) for p, e in zip(group, entries, strict=True)]
        files.append(Planned(f"rank_{rank:05d}_{n:03d}.safetensors", head, start, stop, parts))
        start = stop
    return files


def order(pieces: Sequence[Piece], indices: Sequence[int]) -> list[int]:
    """``indices`` by falling item size, so that every box is aligned in its file."""
    return sorted(indices, key=lambda i: (-ITEM_BYTES[pieces[i][1]], i))


@dataclass(frozen=True)
class Room:
    """Where a rank is, and how much host memory may still be taken there (None: not known)."""

    node: str
    free: int | None


def refuse_too_large(sizes: Sequence[int], rooms: Sequence[Room]) -> None:
    """UserError where the copies of ``sizes`` bytes, one a rank, do not fit into what their nodes have free. Asked
    beforehand: Linux gives memory that it has not, and kills the process that touches it."""
    need: dict[str, list[int]] = {}
    free: dict[str, int] = {}
    for size, room in zip(sizes, rooms, strict=True):
        need.setdefault(room.node, []).append(size)
        if room.free is not None:
            free[room.node] = min(room.free, free.get(room.node, room.free))
    short = [node for node, sizes in need.items() if node in free and sum(sizes) > free[node]]
    if short:
        node = max(short, key=lambda node: sum(need[node]) - free[node])
        raise UserError(
            f"{node}: saving copies the state to host memory first, which takes {say.size(sum(need[node]))} for the "
            f"{words.ranks(len(need[node]))} there, and {say.size(free[node])} are free"
            f"{f' (and {len(short) - 1} more nodes)' if len(short) > 1 else ''}; {_HELPS}"
        )


_HELPS = (
    "ask the scheduler for more memory, shard the state over more nodes (parallel.dp_shard), "
    "or save nothing (checkpoint.every=0 checkpoint.every_minutes=0)"
)


class Snapshot:
    """Host memory for the boxes that this rank writes; UserError where it is not to be had."""

    def __init__(self, size: int, pinned: bool) -> None:
        self._pinned = pinned
        try:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        except (RuntimeError, MemoryError) as error:
            kind = "pinned " if pinned else ""
            raise UserError(
                f"the copy of the state that a save takes, {say.size(size)} of {kind}host memory, cannot be allocated "
                f"({str(error).splitlines()[0] if str(error) else 'out of memory'}); {_HELPS}"
            ) from None
        self.memory.zero_()  # touched now: the first save does not pay for the pages

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors`` one after the other, and return when they are here."""
        at = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            place = self.memory[at : at + size].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=self._pinned)
            at += size
        assert at == self.memory.numel(), "the state's size has changed since the plan was made"
        if self._pinned:
            torch.cuda.synchronize()

    def view(self, start: int, stop: int) -> memoryview:
        return memoryview(self.memory.numpy())[start:stop]
