"""All-gather of keys and values (Llama 3, Dubey et al. 2024, section 3.3.2): simplest, any mask, most memory.

With few kv heads the gathered keys are small beside the attention they feed. The blocks of the rank's own
keys are computed while the others' arrive. Backward gathers again rather than keep what is n times larger,
and a reduce-scatter sums the gradients home.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.ops.attention_partial import Partial
from trainsys.ops.attention_rule import Rule
from trainsys.parallel.context.blocks import Blocks, Ring, zeros


class AllGatherKV:
    def __init__(self, ring: Ring, group: AxisGroup, blocks: Blocks, *, overlap: bool = True) -> None:
        self.ring, self.group, self.blocks, self.overlap = ring, group, blocks, overlap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ring, partial = self.ring, Partial(q)
        gathering = self._gather(k, v)
        self.blocks.forward(partial, q, k, v, ring.mine, ring.mine, rule)
        everyones = gathering.wait()
        for other in self._others():
            theirs = everyones[other]
            self.blocks.forward(partial, q, theirs[0], theirs[1], ring.mine, ring.shards[other], rule)
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, (dq,) = self.ring, zeros(q)
        gathering = self._gather(k, v)
        dkv = torch.stack([zeros(k, v)] * ring.size)
        mine = dkv[ring.index]
        self.blocks.backward(dq, mine, dout, q, k, v, out, lse, ring.mine, ring.mine, rule)
        everyones = gathering.wait()
        for other in self._others():
            ks, vs = everyones[other]
            theirs = ring.shards[other]
            self.blocks.backward(dq, dkv[other], dout, q, ks, vs, out, lse, ring.mine, theirs, rule)
        summed = ops.reduce_scatter(dkv, self.group, 0)[0]
        return dq.to(q.dtype), summed[0].to(k.dtype), summed[1].to(v.dtype)

    def _gather(self, k: Tensor, v: Tensor) -> _Gather:
        gathering = _Gather(torch.stack((k, v)), self.group)
        if not self.overlap:
            gathering.wait()
        return gathering

    def _others(self) -> list[int]:
        return [i for i in range(self.ring.size) if i != self.ring.index]


class _Gather:
    """An all-gather in flight: ``[n, *kv.shape]`` once waited for."""

    def __init__(self, kv: Tensor, group: AxisGroup) -> None:
        self._kv, self._group = kv, group
        self._all = kv.new_empty((group.size, *kv.shape))
        self._work: dist.Work | None = ops.all_gather_flat(
            self._all.view(-1), kv.view(-1), group=group.group, async_op=True
        )

    def wait(self) -> Tensor:
        g = self._group
        if self._work is not None:
            with g.ledger.span(g.axis, "all_gather", ops.nbytes(self._kv) * (g.size - 1)):
                self._work.wait()
            self._work = None
        return self._all
