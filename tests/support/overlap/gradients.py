"""Sums of gradients over replicas, bucket by bucket, beside the rest of backward."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.overlap.link import ATTEMPTS, Lane, Late
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.replicate import GradientBuckets

LAYERS = 6


class _Slow(torch.autograd.Function):
    """A layer whose backward takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits for buckets, of ``comm_s`` each, of layers whose backward takes ``compute_s`` each."""
    replicas = Mesh(Layout(dp_replicate=2), torch.device("cpu"))["dp_replicate"]
    layers = [nn.Parameter(torch.ones(4)) for _ in range(LAYERS)]
    buckets = GradientBuckets(layers, replicas, 1e-6, overlap=on)
    assert len(buckets.buckets) == LAYERS
    reduce, lane, waits = dist.all_reduce, Lane(), []
    try:
        dist.all_reduce = lambda *a, **k: Late(reduce(*a, **k), lane.take(comm_s))
        for _ in range(ATTEMPTS):
            dist.barrier()
            buckets.zero()
            replicas.ledger.reset()
            x = torch.ones(4)
            for weight in layers:
                x = _Slow.apply(x * weight, compute_s)
            x.sum().backward()
            buckets.wait()
            waits.append(replicas.ledger.traffic["dp_replicate", "all_reduce"].blocked_s)
    finally:
        dist.all_reduce = reduce
    return waits


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    """The last layer's bucket has no backward left to hide behind."""
    return comm_s + (LAYERS - 1) * max(0.0, comm_s - (compute_s if on else 0.0))
