"""TokenRing (Wang et al. 2024): queries go round one way while results go home the other way.

As in `pass_q` keys stay and queries travel down the ring; but what a rank computed for a visitor leaves for
its owner at once, up the ring, beside the queries of the next hop. On duplex links the two directions do
not compete, so each carries half of the bytes and both hide behind the next block's computation. Backward
does the same with (q, dout, out, lse) one way and dq the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainsys.comm.p2p import Link
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


class TokenRing:
    def __init__(self, ring: Ring, link: Link, blocks: Blocks) -> None:
        self.ring, self.link, self.blocks = ring, link, blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ring, mine = self.ring, Partial(q)
        visiting, coming, results = q.contiguous(), None, None
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_q", [visiting], to=ring.down(), source=ring.up())
            partial = mine if hop == 0 else Partial(visiting)
            self.blocks.forward(partial, visiting, k, v, ring.shards[ring.up(hop)], ring.mine, rule)
            if results is not None:
                mine.merge(*results.wait())
            if hop > 0:
                computed = [partial.out.to(q.dtype), partial.lse]
                results = self.link.swap("send_out", computed, to=ring.up(hop), source=ring.down(hop))
            if coming is not None:
                (visiting,), coming = coming.wait(), None
        if results is not None:
            mine.merge(*results.wait())
        return mine.out.to(q.dtype), mine.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, dkv, (mine,) = self.ring, zeros(k, v), zeros(q)
        visiting, coming, gradients = [torch.stack((q, dout, out)), lse.contiguous()], None, None
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_q", visiting, to=ring.down(), source=ring.up())
            dq = mine if hop == 0 else torch.zeros_like(mine)
            (qs, douts, outs), lses = visiting
            owner = ring.shards[ring.up(hop)]
            self.blocks.backward(dq, dkv, douts, qs, k, v, outs, lses, owner, ring.mine, rule)
            if gradients is not None:
                mine += gradients.wait()[0]
            if hop > 0:
                gradients = self.link.swap("send_dq", [dq], to=ring.up(hop), source=ring.down(hop))
            if coming is not None:
                visiting, coming = coming.wait(), None
        if gradients is not None:
            mine += gradients.wait()[0]
        return mine.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)
