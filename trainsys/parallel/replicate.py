"""Replicated data parallelism: gradients live in flat buckets, summed as soon as backward fills one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes


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

    Buckets of about ``bucket_mb`` MB are filled in reverse order of ``params``, which is nearly the order
    in which backward produces gradients (Li et al. 2020, PyTorch DDP). A parameter's ``.grad`` is a view
    into its bucket, so nothing is copied; use :meth:`zero` and never ``set_to_none``. Set ``sync`` False
    for all but the last micro-batch.
    """

    def __init__(self, params: Iterable[nn.Parameter], group: AxisGroup, bucket_mb: float) -> None:
        self.group = group
        self.sync = True
        params = list(params)
        self.held = set(params)
        """whose gradients live here"""
        self.buckets: list[_Bucket] = []
        current: list[nn.Parameter] = []
        size = 0
        for p in reversed(params):
            if current and size + nbytes(p) > bucket_mb * 1e6:
                self.buckets.append(_Bucket(current))
                current, size = [], 0
            current.append(p)
            size += nbytes(p)
        if current:
            self.buckets.append(_Bucket(current))
        for bucket in self.buckets:
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))

    def _ready(self, bucket: _Bucket) -> None:
        if not self.sync:
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
