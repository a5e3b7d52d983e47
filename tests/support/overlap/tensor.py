"""Parts of the sequence that travel beside the products with those that are here."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.overlap.link import ATTEMPTS, SlowLink
from trainsys.comm import autograd, ops
from trainsys.layout import Layout
from trainsys.models.layers import Linear
from trainsys.parallel import tensor_overlap
from trainsys.parallel.mesh import Mesh

WORLD, HOPS = 4, 3


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_up, self.w_down = Linear(8, 8), Linear(8, 8)
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(self.w_up(x))


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits of forward and backward of one pair: four passages, each of parts of ``comm_s`` and, where it is taken
    apart, products of ``compute_s``."""
    tp = Mesh(Layout(tp=WORLD), torch.device("cpu"))["tp"]
    pair = _Pair()
    product = tensor_overlap.product
    collectives = ops.all_gather_flat, ops.reduce_scatter_flat

    def slow_product(x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(compute_s)
        return product(x, weight)

    def slow(collective: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            collective(*args, **options)
            time.sleep(HOPS * comm_s)

        return run

    if on:
        tensor_overlap.overlap_pair(pair, SlowLink(tp, comm_s))
    else:
        pair.register_forward_pre_hook(lambda _, args: (autograd.gather(args[0], tp, 1),))
        pair.register_forward_hook(lambda _, args, out: autograd.scatter_sum(out, tp, 1))
    waits = []
    try:
        tensor_overlap.product = slow_product
        ops.all_gather_flat, ops.reduce_scatter_flat = (slow(c) for c in collectives)
        for _ in range(ATTEMPTS):
            dist.barrier()
            tp.ledger.reset()
            pair(torch.ones(1, 4, 8, requires_grad=True)).sum().backward()
            waits.append(sum(t.blocked_s for t in tp.ledger.traffic.values()))
    finally:
        tensor_overlap.product = product
        ops.all_gather_flat, ops.reduce_scatter_flat = collectives
    return waits


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    return 4 * HOPS * max(0.0, comm_s - (compute_s if on else 0.0))
