"""The ranks of a run, for the small objects that they exchange beside training; one process needs none of it."""

from __future__ import annotations

import itertools
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from trainsys.comm.tree import Buffer, Tree
from trainsys.comm.wire import Peer, Wire
from trainsys.errors import MachineFault, UserError

T = TypeVar("T")
TIMEOUT_S = 600.0
_SQUEEZED = 4096
"""Bytes from which a message is compressed: what ranks tell is mostly names, the same again and again."""

_numbers = itertools.count()


class Ranks:
    """Object exchange of all ranks over sockets of its own, never over a process group; from one thread at a time:
    ``beside`` makes another for background work, so that its messages never mix with those of the step.

    Every rank must make it, and call its methods, in the same order. What fails is LostPeer within ``timeout_s``
    seconds. At most ``tree.FANOUT`` + 2 file descriptors a rank, whatever the world.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        up = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if up else (0, 1)
        self.tree: Tree | None = None
        if self.world > 1:
            store = dist.distributed_c10d._get_default_store()
            self._wire = Wire(store, f"ranks{next(_numbers)}", self.rank, timeout_s)
            self.tree = Tree(self._wire, self.world)

    def beside(self, timeout_s: float = 3600.0) -> Ranks:
        """Another over the same ranks; every rank must call it."""
        return self if self.world == 1 else Ranks(timeout_s)

    def from_first(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        if self.tree is None:
            return value
        data = self.tree.broadcast(_pack(value) if self.rank == 0 else b"")
        return value if self.rank == 0 else cast(T, _unpack(data))

    def on_first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on rank 0, on every rank; a UserError or MachineFault of it is raised on every rank."""
        outcome: T | UserError | MachineFault | None = None
        if self.rank == 0:
            try:
                outcome = call()
            except (UserError, MachineFault) as error:
                outcome = error
        outcome = self.from_first(outcome)
        if isinstance(outcome, UserError | MachineFault):
            raise outcome
        return cast(T, outcome)

    def to_first(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank, on rank 0; an empty list elsewhere."""
        if self.tree is None:
            return [value]
        return [cast(T, _unpack(data)) for data in self.tree.gather(_pack(value))]

    def to_all(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank, on every rank. What one rank alone needs goes by ``to_first``, which
        sends a world-th of it."""
        return self.from_first(self.to_first(value))

    def each(self, values: Sequence[T]) -> T:
        """``values[rank]`` of rank 0, on each rank; those of other ranks are not looked at."""
        if self.tree is None:
            return values[0]
        data = self.tree.scatter([_pack(v) for v in values] if self.rank == 0 else ())
        return cast(T, _unpack(data))

    def barrier(self) -> None:
        """Until every rank is here."""
        self.to_all(None)

    @contextmanager
    def calling(self, rank: int) -> Iterator[Peer]:
        """A connection of its own to ``rank``, which must be ``answering`` this one."""
        yield from _closed(self._wire.dial(rank))

    @contextmanager
    def answering(self, rank: int) -> Iterator[Peer]:
        yield from _closed(self._wire.answer(rank))

    def close(self) -> None:
        """The sockets are closed; nothing may be exchanged after it."""
        if self.tree is not None:
            self.tree.close()
            self._wire.close()


def _closed(peer: Peer) -> Iterator[Peer]:
    try:
        yield peer
    finally:
        peer.close()


def _pack(value: object) -> bytes:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return b"z" + zlib.compress(data, 1) if len(data) > _SQUEEZED else b"p" + data


def _unpack(data: Buffer) -> object:
    body = memoryview(data)[1:]
    return pickle.loads(zlib.decompress(body) if data[0] == ord("z") else body)
