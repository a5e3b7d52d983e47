"""The ranks of a run, for the few small objects that checkpoints exchange; one process needs no group."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """Object collectives over all ranks. A group is used from one thread at a time: ``beside`` makes another
    for background work, so that its messages never mix with those of the training step."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        up = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if up else (0, 1)

    def beside(self, timeout_s: float = 3600.0) -> Ranks:
        """A gloo group of its own over all ranks; every rank must call it."""
        if self.world == 1:
            return self
        return Ranks(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))

    def from_first(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def to_first(self, value: T) -> list[T]:
        """Every rank's ``value`` on rank 0; an empty list elsewhere."""
        if self.world == 1:
            return [value]
        out: list[T] | None = [value] * self.world if self.rank == 0 else None
        dist.gather_object(value, out, dst=0, group=self.group)
        return out or []

    def to_all(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank."""
        if self.world == 1:
            return [value]
        out: list[T] = [value] * self.world
        dist.all_gather_object(out, value, group=self.group)
        return out
