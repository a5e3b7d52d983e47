"""Pass-Q: keys stay, queries go round (Yang et al. 2024, Context Parallelism for Scalable Million-Token
Inference). Worth it where queries are smaller than keys and values: many kv heads, or a window.

Queries travel down the ring, towards earlier tokens. Each rank computes the visiting queries over its own
keys and keeps the partial result; at the end one exchange returns all of them to their owners, who merge.
In backward the queries travel with dout, out and lse; key gradients never leave home, and query gradients
follow one hop behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainsys.comm.p2p import Link
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


class RingPassQ:
    def __init__(self, ring: Ring, link: Link, blocks: Blocks) -> None:
        self.ring, self.link, self.blocks = ring, link, blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ring = self.ring
        visiting, coming = q.contiguous(), None
        computed: list[Partial] = []
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_q", [visiting], to=ring.down(), source=ring.up())
            partial = Partial(visiting)
            self.blocks.forward(partial, visiting, k, v, ring.shards[ring.up(hop)], ring.mine, rule)
            computed.append(partial)
            if coming is not None:
                (visiting,), coming = coming.wait(), None
        mine, *others = computed
        returned = [(torch.empty_like(visiting), torch.empty_like(mine.lse)) for _ in others]
        self.link.exchange(
            "send_out",
            [(x, ring.up(h)) for h, p in enumerate(others, 1) for x in (p.out.to(q.dtype), p.lse)],
            [(x, ring.down(h)) for h, pair in enumerate(returned, 1) for x in pair],
        ).wait()
        for out, lse in returned:
            mine.merge(out, lse)
        return mine.out.to(q.dtype), mine.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, dkv = self.ring, zeros(k, v)
        visiting, coming, gradients = [torch.stack((q, dout, out)), lse.contiguous()], None, None
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_q", visiting, to=ring.down(), source=ring.up())
            (dq,), ((qs, douts, outs), lses) = zeros(q), visiting
            owner = ring.shards[ring.up(hop)]
            self.blocks.backward(dq, dkv, douts, qs, k, v, outs, lses, owner, ring.mine, rule)
            if gradients is not None:
                dq += gradients.wait()[0]
            if ring.hops:
                step = 1 if hop < ring.hops else -ring.hops
                gradients = self.link.swap("send_dq", [dq], to=ring.down(step), source=ring.up(step))
            if coming is not None:
                visiting, coming = coming.wait(), None
        if gradients is not None:
            (dq,) = gradients.wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)
