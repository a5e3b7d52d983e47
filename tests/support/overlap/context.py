"""Keys that go round the ring beside the attention over those that are here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from support.overlap.link import ATTEMPTS, SlowLink
from trainsys.context.balance import shard
from trainsys.layout import Layout
from trainsys.ops.attention_rule import Rule, Visible
from trainsys.ops.attention_seam import Method
from trainsys.parallel.context.blocks import Blocks, Ring
from trainsys.parallel.context.pass_q import RingPassQ
from trainsys.parallel.context.ring import RingPassKV
from trainsys.parallel.context.token_ring import TokenRing
from trainsys.parallel.mesh import Mesh

WORLD, HOPS, SEQ, HEADS, HEAD_DIM = 4, 3, 64, 2, 8
FLAVOURS: dict[str, type[RingPassKV | RingPassQ | TokenRing]] = {
    "ring": RingPassKV,
    "pass_q": RingPassQ,
    "token_ring": TokenRing,
}


@dataclass
class SleepingKernel:
    """A zigzag has two visible blocks in a hop, three in the first, where two of them are half hidden."""

    block_s: float
    fixed_shapes = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        time.sleep(self.block_s / 2 if visible == "causal" else self.block_s)
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.block_s / 2 if visible == "causal" else self.block_s)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def waits(flavour: str, compute_s: float, comm_s: float, way: str, overlap: bool = True) -> list[float]:
    """Seconds spent waiting in each attempt, on this rank."""
    mesh = Mesh(Layout(cp=WORLD), torch.device("cpu"))
    cp, ledger = mesh["cp"], mesh.ledger
    ring = Ring(cp.index, tuple(shard(SEQ, WORLD, i, "zigzag") for i in range(WORLD)), HOPS)
    q, k, v = torch.zeros(3, 1, SEQ // WORLD, HEADS, HEAD_DIM)
    lse = torch.zeros(1, HEADS, SEQ // WORLD)
    found = []
    for _ in range(ATTEMPTS):
        link = SlowLink(cp, comm_s, overlap=overlap)
        method: Method = FLAVOURS[flavour](ring, link, Blocks(SleepingKernel(compute_s / 2)))
        dist.barrier()
        ledger.reset()
        if way == "forward":
            method.forward(q, k, v, Rule())
        else:
            method.backward(q, q, k, v, q, lse, Rule())
        found.append(sum(t.blocked_s for t in ledger.traffic.values()))
    return found


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits of a forward, of hops of ``compute_s`` each and keys of ``comm_s`` each."""
    return waits("ring", compute_s, comm_s, "forward", on)


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    """Each of the n - 1 transfers hides behind one hop, and zigzag makes all hops equally long."""
    return HOPS * max(0.0, comm_s - (compute_s if on else 0.0))
