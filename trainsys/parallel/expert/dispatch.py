"""Rows to the experts' ranks and back: what takes the place of :class:`trainsys.models.moe.LocalDispatch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainsys.models.moe import Part, flat
from trainsys.models.router import Routing
from trainsys.ops.permute import Sorted, collect, sort_by_expert, spread
from trainsys.parallel.expert.route import Route

Sent = tuple[list[Route], list[Sorted], tuple[Tensor, ...]]
"""Each chunk's route, order and gates."""


class RouteMaker(Protocol):
    def routes(self, counts: Tensor, totals: list[int]) -> list[Route]: ...


class ExpertDispatch:
    """Tokens go in ``chunks`` parts: while one is computed, the next arrives and the one before goes home."""

    def __init__(self, router: RouteMaker, chunks: int) -> None:
        self.router, self.chunks = router, chunks

    def send(self, x: Tensor, routing: Routing, n_experts: int) -> tuple[Sent, list[Tensor], Sequence[Part]]:
        choices, gates, kept = flat(routing)
        # As many parts on every rank, empty ones if need be: all take part in every exchange.
        tokens = [len(x) * (c + 1) // self.chunks - len(x) * c // self.chunks for c in range(self.chunks)]
        kepts = [None] * self.chunks if kept is None else kept.split(tokens)
        orders = [
            sort_by_expert(some, n_experts, k) for some, k in zip(choices.split(tokens), kepts, strict=True)
        ]
        counts = torch.stack([by.counts for by in orders])
        routes = self.router.routes(counts, [len(by.slots) for by in orders])
        rows = [
            route.depart(spread(part, by))
            for route, part, by in zip(routes, x.split(tokens), orders, strict=True)
        ]
        return (routes, orders, gates.split(tokens)), rows, routes

    def receive(self, state: Sent, returned: Sequence[Tensor]) -> Tensor:
        parts = [
            collect(route.come_home(rows), gates, by)
            for rows, route, by, gates in zip(returned, *state, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
