"""Rows that travel to their experts and home in parts, beside the experts' work on other parts."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support.overlap.link import ATTEMPTS, Lane, sleep_until
from trainsys.config.run import ExpertConfig
from trainsys.layout import Layout
from trainsys.models.moe import Experts
from trainsys.models.router import Routing
from trainsys.parallel.expert import route, trip
from trainsys.parallel.expert.apply import route_maker
from trainsys.parallel.expert.dispatch import ExpertDispatch
from trainsys.parallel.mesh import Mesh

WORLD, EXPERTS, TOP_K, TOKENS, WIDTH, CHUNKS = 4, 8, 2, 24, 6, 4


def mesh_of() -> Mesh:
    return Mesh(Layout(dp_shard=WORLD, ep=WORLD), torch.device("cpu"))


def routing(rank: int, skew: bool) -> tuple[Tensor, Routing]:
    """Tokens of a rank and where they go. ``skew``: rank 1 has no expert that anybody wants."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator)
    wanted = torch.rand(TOKENS, EXPERTS, generator=generator)
    if skew:
        wanted[:, 2:4] = -1
    gates = torch.rand(1, TOKENS, TOP_K, generator=generator)
    return x, Routing(wanted.topk(TOP_K).indices.unsqueeze(0), gates, None)


class _SlowTrip(trip.Trip):
    """A link that takes one message after the other, each for ``seconds``; it is never early."""

    seconds = 0.0
    lane = Lane()

    def _launch(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        self.done = _SlowTrip.lane.take(_SlowTrip.seconds)
        return super()._launch(x, sends, receives)

    def _land(self) -> Tensor:
        g = self.group
        with g.ledger.span(g.axis, "slow", 0):
            sleep_until(self.done)
        return super()._land()


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


class _SleepingExperts(Experts):
    def __init__(self, seconds: float) -> None:
        super().__init__(1, 1, 1, "gelu")
        self.seconds = seconds

    def compute(self, x: Tensor, counts: Tensor) -> Tensor:
        out: Tensor = _Slow.apply(x, self.seconds)
        return out


def both_ways(chunks: int, trip_s: float, compute_s: float) -> list[tuple[float, float]]:
    """(forward, backward) seconds this rank waited in each attempt; both arguments are of the whole batch."""
    mesh = mesh_of()
    dispatch = ExpertDispatch(route_maker(mesh, ExpertConfig()), chunks)
    experts = _SleepingExperts(compute_s / chunks)
    waits = []
    try:
        route.Trip = _SlowTrip  # type: ignore[misc]
        _SlowTrip.seconds = trip_s / chunks
        for _ in range(ATTEMPTS):
            x, routed = routing(mesh.rank, False)
            x.requires_grad_()
            both = []
            for way in ("forward", "backward"):
                dist.barrier()
                mesh.ledger.reset()
                _SlowTrip.lane = Lane()
                if way == "forward":
                    state, rows, parts = dispatch.send(x.flatten(0, 1), routed, EXPERTS)
                    out = dispatch.receive(state, experts(rows, parts))
                else:
                    out.sum().backward()
                both.append(mesh.ledger.traffic["ep", "slow"].blocked_s)
            waits.append((both[0], both[1]))
    finally:
        route.Trip = trip.Trip  # type: ignore[misc]
    return waits


def predicted(chunks: int, trip_s: float, compute_s: float) -> float:
    """Waits of one pass: trips on one lane, all of the way there queued at the start."""
    each, work = trip_s / chunks, compute_s / chunks
    lane, now, waited = chunks * each, 0.0, 0.0
    homes = []
    for c in range(chunks):
        arrival = (c + 1) * each
        waited += max(0.0, arrival - now)
        now = max(now, arrival) + work
        lane = max(lane, now) + each
        homes.append(lane)
    for home in homes:
        waited += max(0.0, home - now)
        now = max(now, home)
    return waited


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """Waits of forward and backward; ``comm_s`` and ``compute_s`` are of one part of four."""
    each = both_ways(CHUNKS if on else 1, CHUNKS * comm_s, CHUNKS * compute_s)
    return [forward + backward for forward, backward in each]


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    return 2 * predicted(CHUNKS if on else 1, CHUNKS * comm_s, CHUNKS * compute_s)
