"""Ring attention: queries stay, keys and values go round (Liu et al. 2023, Ring Attention with Blockwise
Transformers; balanced by the zigzag cut of Llama 3, Dubey et al. 2024).

At hop h a rank holds the keys of the member h places before it. While it computes with them the next ones
are on their way, so that a hop costs max(compute, transfer). In backward the keys go round again and their
gradients follow one hop behind: each rank adds its part and passes them on, and the last sends them home.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainsys.comm.p2p import Link
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


class RingPassKV:
    def __init__(self, ring: Ring, link: Link, blocks: Blocks) -> None:
        self.ring, self.link, self.blocks = ring, link, blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ring, partial = self.ring, Partial(q)
        kv, coming = torch.stack((k, v)), None
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_kv", [kv], to=ring.up(), source=ring.down())
            self.blocks.forward(partial, q, kv[0], kv[1], ring.mine, ring.shards[ring.down(hop)], rule)
            if coming is not None:
                (kv,), coming = coming.wait(), None
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, (dq,) = self.ring, zeros(q)
        kv, coming, gradients = torch.stack((k, v)), None, None
        for hop in range(ring.hops + 1):
            if hop < ring.hops:
                coming = self.link.swap("send_kv", [kv], to=ring.up(), source=ring.down())
            dkv = zeros(k, v)
            source = ring.shards[ring.down(hop)]
            self.blocks.backward(dq, dkv, dout, q, kv[0], kv[1], out, lse, ring.mine, source, rule)
            if gradients is not None:
                # What the others already added to these keys' gradients, on its way since the last hop.
                dkv += gradients.wait()[0]
            if ring.hops:
                # Onwards behind the keys; from the last member that sees them, home.
                step = 1 if hop < ring.hops else -ring.hops
                gradients = self.link.swap("send_dkv", [dkv], to=ring.up(step), source=ring.down(step))
            if coming is not None:
                (kv,), coming = coming.wait(), None
        if gradients is not None:
            (dkv,) = gradients.wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)
