"""The double ring of LoongTrain's 2D attention (Gu et al. 2024): heads × context, and the context a ring of rings.

Heads are spread by Ulysses' all-to-all (`core` does that around any method); what is here moves keys between
the ranks that hold the same heads. A ring of n is cut into ``outer`` rings of ``inner`` ranks, say one a
node. Keys go round their inner ring; meanwhile those that every inner ring started with travel to the next
inner ring over the slower links, which so have ``inner`` hops of compute to hide behind instead of one, and
all the network cards of a node at once instead of one pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainsys.comm.p2p import Incoming, Link
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


class DoubleRing:
    """``inner`` and ``outer`` are the links along the two; a member's place in the whole ring is
    ``outer index * inner size + inner index``."""

    def __init__(self, ring: Ring, inner: Link, outer: Link, blocks: Blocks) -> None:
        self.ring, self.inner, self.outer, self.blocks = ring, inner, outer, blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        partial, first = Partial(q), torch.stack((k, v))
        coming = from_afar = None
        for turn in range(self.outer.group.size):
            if turn < self.outer.group.size - 1:
                from_afar = _pass_on(self.outer, "send_kv_outer", first)
            kv = first
            for hop in range(self.inner.group.size):
                if hop < self.inner.group.size - 1:
                    coming = _pass_on(self.inner, "send_kv_inner", kv)
                at = self.ring.shards[self._source(turn, hop)]
                self.blocks.forward(partial, q, kv[0], kv[1], self.ring.mine, at, rule)
                if coming is not None:
                    (kv,), coming = coming.wait(), None
            if from_afar is not None:
                (first,), from_afar = from_afar.wait(), None
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients follow their keys one hop behind, round the inner ring and back to where they entered it,
        and then from ring to ring; after the last ring they are home."""
        (dq,), first = zeros(q), torch.stack((k, v))
        coming = from_afar = gradients = sums = None
        for turn in range(self.outer.group.size):
            if turn < self.outer.group.size - 1:
                from_afar = _pass_on(self.outer, "send_kv_outer", first)
            kv = first
            for hop in range(self.inner.group.size):
                if hop < self.inner.group.size - 1:
                    coming = _pass_on(self.inner, "send_kv_inner", kv)
                dkv = zeros(k, v)
                at = self.ring.shards[self._source(turn, hop)]
                self.blocks.backward(dq, dkv, dout, q, kv[0], kv[1], out, lse, self.ring.mine, at, rule)
                if gradients is not None:
                    dkv += gradients.wait()[0]
                if self.inner.group.size > 1:
                    gradients = _pass_on(self.inner, "send_dkv_inner", dkv)
                if coming is not None:
                    (kv,), coming = coming.wait(), None
            if gradients is not None:
                (dkv,), gradients = gradients.wait(), None
            if sums is not None:
                dkv += sums.wait()[0]
            if self.outer.group.size > 1:
                sums = _pass_on(self.outer, "send_dkv_outer", dkv)
            if from_afar is not None:
                (first,), from_afar = from_afar.wait(), None
        if sums is not None:
            (dkv,) = sums.wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)

    def _source(self, turn: int, hop: int) -> int:
        """Whose keys are here at this hop of this turn."""
        inner, outer = self.inner.group, self.outer.group
        return (outer.index - turn) % outer.size * inner.size + (inner.index - hop) % inner.size


def _pass_on(link: Link, op: str, x: Tensor) -> Incoming:
    """``x`` to the next member of the link's group, that of the one before here."""
    g = link.group
    return link.swap(op, [x], to=(g.index + 1) % g.size, source=(g.index - 1) % g.size)
