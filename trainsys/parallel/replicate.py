"""Replicated data parallelism: gradients are summed over the replicas as soon as backward has made them.

Plain parameters have their gradients in flat buckets (`GradientBuckets`); what FSDP has reduced over its own ranks
is summed shard by shard (`ShardSums`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes
from trainsys.optim.local import local, local_grad


def in_buckets(params: Iterable[nn.Parameter], bucket_mb: float) -> list[list[nn.Parameter]]:
    """About ``bucket_mb`` MB of this rank's parts each, last parameters first: nearly the order in which backward
    makes gradients (Li et al. 2020, PyTorch DDP)."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(list(params)):
        each = nbytes(local(p))
        if not buckets or size + each > bucket_mb * 1e6:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += each
    return buckets


class _Bucket:
    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.flat = params[0].new_zeros(sum(p.numel() for p in params))
        self.missing = len(params)
        self.work: dist.Work | None = None
        offset = 0
        for p in params:
            p.grad = self.flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()


class GradientBuckets:
    """All-reduce (sum) of gradients over ``group``, overlapped with the rest of backward.

    A parameter's ``.grad`` is a view into its bucket, so nothing is copied; use :meth:`zero` and never
    ``set_to_none``. Set ``sync`` False for all but the last micro-batch. Without ``overlap`` everything is
    sent by `wait`.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], group: AxisGroup, bucket_mb: float, *, overlap: bool = True
    ) -> None:
        self.group, self.overlap = group, overlap
        self.sync = True
        params = list(params)
        self.held = set(params)
        """whose gradients live here"""
        self.buckets = [_Bucket(some) for some in in_buckets(params, bucket_mb)]
        for bucket in self.buckets:
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))

    def _ready(self, bucket: _Bucket) -> None:
        if not (self.sync and self.overlap):
            return
        bucket.missing -= 1
        if bucket.missing == 0:
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        bucket.work = dist.all_reduce(bucket.flat, group=self.group.group, async_op=True)

    def start(self) -> None:
        """Start to sum whatever is not yet under way. A parameter that got no gradient counts as zero."""
        for bucket in self.buckets:
            if bucket.work is None:
                self._launch(bucket)

    def wait(self) -> None:
        """Block until every gradient is summed."""
        g = self.group
        self.start()
        for bucket in self.buckets:
            assert bucket.work is not None
            with g.ledger.span(g.axis, "all_reduce", 2 * nbytes(bucket.flat) * (g.size - 1) // g.size):
                bucket.work.wait()
            bucket.work, bucket.missing = None, len(bucket.params)

    def zero(self) -> None:
        torch._foreach_zero_([bucket.flat for bucket in self.buckets])

    def share(self) -> None:
        """Every replica has made the same update: nothing to send."""


class ShardSums:
    """What FSDP's all-reduce hooks call: sums each unit's reduced shard over ``group``, in place, while backward goes on.

    Where FSDP reduces after every micro-batch, set ``last`` False before all backwards but the last: shards add up, and
    their sum goes over the replicas once.
    """

    def __init__(self, group: AxisGroup, *, overlap: bool = True) -> None:
        self.group, self.overlap, self.last = group, overlap, True
        self._under_way: list[tuple[Tensor, dist.Work]] = []

    def reduced(self, params: Sequence[nn.Parameter], shard: Tensor) -> None:
        """``shard``: flat, this rank's of one backward's gradients of ``params``, a unit. FSDP is about to add it to the
        gradients of before, or to make views of it the gradients where there are none."""
        if not self.last:
            _used_on_this_stream(shard)
            return
        before = [g for p in params if (g := local_grad(p)) is not None]
        if before:
            # Views of an earlier shard, each at the same place of it, unless the unit had other gradients then.
            assert all(g.untyped_storage().nbytes() == nbytes(shard) for g in before)
            here = [shard.as_strided(g.size(), g.stride(), g.storage_offset()) for g in before]
            torch._foreach_add_(here, before)
            _used_on_this_stream(before[0])
            for p in params:
                p.grad = None
        work = dist.all_reduce(shard, group=self.group.group, async_op=True)
        self._under_way.append((shard, work))
        if not self.overlap:
            self.wait()

    def wait(self) -> None:
        """Block until every shard is summed. The gradients are views of them."""
        g = self.group
        for shard, work in self._under_way:
            with g.ledger.span(g.axis, "all_reduce", 2 * nbytes(shard) * (g.size - 1) // g.size):
                work.wait()
        self._under_way.clear()


def _used_on_this_stream(x: Tensor) -> None:
    """FSDP made ``x`` on its stream of reductions and may free it before what is enqueued here has read it."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
