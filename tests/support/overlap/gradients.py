"""Sums of gradients over replicas, bucket by bucket, beside the rest of backward."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.overlap.link import ATTEMPTS, Lane, Late
from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.replica_shards import ReplicaShards
from trainsys.parallel.replicate import GradientBuckets

LAYERS, BUCKET_MB = 6, 1e-6  # one layer a bucket


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


Sums = GradientBuckets | ReplicaShards


def _waits(sums: Sums, layers: list[nn.Parameter], op: str, compute_s: float) -> list[float]:
    ledger, found = sums.group.ledger, []
    for _ in range(ATTEMPTS):
        dist.barrier()
        sums.zero()
        ledger.reset()
        x = torch.ones(4)
        for weight in layers:
            x = _Slow.apply(x * weight, compute_s)
        sums.sync = True
        x.sum().backward()
        sums.wait()
        found.append(ledger.traffic["dp_replicate", op].blocked_s)
    return found


def _layers() -> tuple[list[nn.Parameter], AxisGroup]:
    mesh = Mesh(Layout(dp_replicate=2), torch.device("cpu"))
    return [nn.Parameter(torch.ones(4)) for _ in range(LAYERS)], mesh["dp_replicate"]


def _measured(
    sums: Sums, layers: list[nn.Parameter], where: Any, name: str, op: str, comm_s: float, compute_s: float
) -> list[float]:
    """Waits while each call of ``where.name`` takes ``comm_s``."""
    assert len(sums.buckets) == LAYERS
    real, lane = getattr(where, name), Lane()
    try:
        setattr(where, name, lambda *a, **k: Late(real(*a, **k), lane.take(comm_s)))
        return _waits(sums, layers, op, compute_s)
    finally:
        setattr(where, name, real)


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits for buckets, of ``comm_s`` each, of layers whose backward takes ``compute_s`` each."""
    layers, replicas = _layers()
    sums = GradientBuckets(layers, replicas, BUCKET_MB, overlap=on)
    return _measured(sums, layers, dist, "all_reduce", "all_reduce", comm_s, compute_s)


def measure_pieces(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """The same where each replica gets the sums of its pieces alone."""
    layers, replicas = _layers()
    sums = ReplicaShards(layers, replicas, BUCKET_MB, overlap=on)
    return _measured(sums, layers, ops, "reduce_scatter_flat", "reduce_scatter", comm_s, compute_s)


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    """The last layer's bucket has no backward left to hide behind."""
    return comm_s + (LAYERS - 1) * max(0.0, comm_s - (compute_s if on else 0.0))
