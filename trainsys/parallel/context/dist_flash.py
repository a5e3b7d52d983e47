"""DistFlashAttention, once LightSeq (Li et al. 2023): idle ranks of a causal ring help the busy ones.

Shards are contiguous, so rank p has p + 1 blocks to compute: its queries over the keys of ranks 0..p. In
turn t rank p computes the keys of rank p - t, if there are any; the t ranks that have none left help
instead: rank p takes the queries of rank p + n - t, computes them over its own keys, and returns the
partial result. So n/2 turns do what takes a plain ring n - 1, and nobody sends keys that no later rank
needs. For even n the last turn has one half of the pairs twice; there the owners compute and nobody helps.

What turn t + 1 needs is under way while turn t computes, results go home during the next turn's compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from trainsys.comm.p2p import Incoming, Link
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


@dataclass(frozen=True)
class Turn:
    """What one rank does in one turn; None: nothing. Each number is a member of the ring."""

    keys_from: int | None
    """compute the own queries over this rank's keys"""
    keys_to: int | None
    help_for: int | None
    """compute this rank's queries over the own keys"""
    helped_by: int | None


def schedule(size: int, index: int, hops: int) -> list[Turn]:
    """Turns 1 .. size // 2 of the rank at ``index``, leaving out pairs more than ``hops`` apart."""
    turns = []
    for t in range(1, size // 2 + 1):
        near = t <= hops
        helping = size - t <= hops and 2 * t != size
        turns.append(
            Turn(
                keys_from=index - t if near and index >= t else None,
                keys_to=index + t if near and index + t < size else None,
                help_for=index + size - t if helping and index < t else None,
                helped_by=index + t - size if helping and index + t >= size else None,
            )
        )
    return turns


class DistFlash:
    def __init__(self, ring: Ring, link: Link, blocks: Blocks) -> None:
        self.ring, self.link, self.blocks = ring, link, blocks
        self.turns = schedule(ring.size, ring.index, ring.hops)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ring, mine = self.ring, Partial(q)
        kv, queries = torch.stack((k, v)), [q.contiguous()]
        guests = _Guests(self.link, self.turns, kv, queries)
        self.blocks.forward(mine, q, k, v, ring.mine, ring.mine, rule)
        returning: list[Incoming] = []
        for turn in self.turns:
            keys, visitor = guests.arrived()
            if turn.keys_from is not None:
                source = ring.shards[turn.keys_from]
                self.blocks.forward(mine, q, *keys[0], ring.mine, source, rule)
            computed: list[Tensor] = []
            if turn.help_for is not None:
                partial = Partial(q)
                owner = ring.shards[turn.help_for]
                self.blocks.forward(partial, visitor[0], k, v, owner, ring.mine, rule)
                computed = [partial.out.to(q.dtype), partial.lse]
            like = [q, mine.lse]
            returning.append(self.link.swap("send_out", computed, turn.help_for, turn.helped_by, like))
        for results in returning:
            if arrived := results.wait():
                mine.merge(*arrived)
        return mine.out.to(q.dtype), mine.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, dkv, (dq,) = self.ring, zeros(k, v), zeros(q)
        kv, queries = torch.stack((k, v)), [torch.stack((q, dout, out)), lse.contiguous()]
        guests = _Guests(self.link, self.turns, kv, queries)
        self.blocks.backward(dq, dkv, dout, q, k, v, out, lse, ring.mine, ring.mine, rule)
        returning: list[tuple[Tensor, Incoming]] = []
        for turn in self.turns:
            keys, visitor = guests.arrived()
            for_keys: list[Tensor] = []
            for_queries: list[Tensor] = []
            if turn.keys_from is not None:
                source, for_keys = ring.shards[turn.keys_from], [zeros(k, v)]
                self.blocks.backward(dq, for_keys[0], dout, q, *keys[0], out, lse, ring.mine, source, rule)
            if turn.help_for is not None:
                (qs, douts, outs), lses = visitor
                owner, for_queries = ring.shards[turn.help_for], [torch.zeros_like(dq)]
                self.blocks.backward(for_queries[0], dkv, douts, qs, k, v, outs, lses, owner, ring.mine, rule)
            returning += [
                (dkv, self.link.swap("send_dkv", for_keys, turn.keys_from, turn.keys_to, [dkv])),
                (dq, self.link.swap("send_dq", for_queries, turn.help_for, turn.helped_by, [dq])),
            ]
        for total, parts in returning:
            for part in parts.wait():
                total += part
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)


class _Guests:
    """Keys and queries of other ranks, always one turn ahead."""

    def __init__(self, link: Link, turns: list[Turn], kv: Tensor, queries: list[Tensor]) -> None:
        self._link, self._turns, self._kv, self._queries = link, iter(turns), kv, queries
        self._coming: list[Incoming] = []
        self._start()

    def _start(self) -> None:
        for turn in islice(self._turns, 1):
            self._coming = [
                self._link.swap("send_kv", [self._kv], turn.keys_to, turn.keys_from),
                self._link.swap("send_q", self._queries, turn.helped_by, turn.help_for),
            ]

    def arrived(self) -> tuple[list[Tensor], list[Tensor]]:
        """Wait for this turn's, start the next turn's. What the turn does not need is empty."""
        keys, visitor = (incoming.wait() for incoming in self._coming)
        self._start()
        return keys, visitor
