"""Broadcast, gather and scatter of bytes over a tree of ranks, root 0: few sockets a rank, few hops."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from trainsys.comm.wire import Peer, Wire

FANOUT = 16
"""Children of a rank. 16,384 ranks are four levels deep; a rank holds 17 connections at most."""
_RECORD = struct.Struct("!IQ")
"""rank, bytes that follow"""

Buffer = bytes | bytearray | memoryview


def parent(rank: int, fanout: int = FANOUT) -> int:
    return (rank - 1) // fanout


def children(rank: int, world: int, fanout: int = FANOUT) -> range:
    first = rank * fanout + 1
    return range(min(first, world), min(first + fanout, world))


def towards(rank: int, target: int, fanout: int = FANOUT) -> int:
    """The child of ``rank`` below which ``target`` is, which is below ``rank``."""
    while (above := parent(target, fanout)) != rank:
        target = above
    return target


class Tree:
    """All ranks call the same method at the same time, one thread of each. LostPeer where a neighbour fails."""

    def __init__(self, wire: Wire, world: int, fanout: int = FANOUT) -> None:
        self.rank, self.fanout = wire.rank, fanout
        self.sent_bytes = 0
        """by this rank, so far"""
        self._number = 0
        self._above: Peer | None = wire.dial(parent(self.rank, fanout)) if self.rank else None
        self._below = {child: wire.answer(child) for child in children(self.rank, world, fanout)}

    def broadcast(self, data: Buffer) -> Buffer:
        """Rank 0's ``data``."""
        self._number += 1
        if self._above is not None:
            data = self._above.receive(b"bcst", self._number)
        for peer in self._below.values():
            self._send(peer, b"bcst", data)
        return data

    def gather(self, data: Buffer) -> list[Buffer]:
        """Every rank's ``data``, by rank, on rank 0; empty elsewhere."""
        self._number += 1
        parts: list[Buffer] = [_RECORD.pack(self.rank, len(data)), data]
        parts += [peer.receive(b"gath", self._number) for peer in self._below.values()]
        if self._above is not None:
            self._send(self._above, b"gath", *parts)
            return []
        found = dict(record for part in parts[2:] for record in _records(part))
        return [data, *(found[rank] for rank in range(1, len(found) + 1))]

    def scatter(self, parts: Sequence[Buffer]) -> Buffer:
        """``parts[rank]`` of rank 0, where there is one a rank; others' ``parts`` do not matter."""
        self._number += 1
        records: Iterable[tuple[int, Buffer]] = enumerate(parts)
        if self._above is not None:
            records = _records(self._above.receive(b"scat", self._number))
        mine: Buffer = b""
        below: dict[int, list[Buffer]] = {child: [] for child in self._below}
        for rank, data in records:
            if rank == self.rank:
                mine = data
            else:
                below[towards(self.rank, rank, self.fanout)] += [_RECORD.pack(rank, len(data)), data]
        for child, some in below.items():
            self._send(self._below[child], b"scat", *some)
        return mine

    def close(self) -> None:
        for peer in (*([self._above] if self._above else []), *self._below.values()):
            peer.close()

    def _send(self, peer: Peer, op: bytes, *parts: Buffer) -> None:
        self.sent_bytes += sum(map(len, parts))
        peer.send(op, self._number, *parts)


def _records(data: Buffer) -> Iterable[tuple[int, Buffer]]:
    view, at = memoryview(data), 0
    while at < len(view):
        rank, size = _RECORD.unpack_from(view, at)
        at += _RECORD.size
        yield rank, view[at : at + size]
        at += size
