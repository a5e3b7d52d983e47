"""Rows between the ranks of a group, any number from each to each, in two halves with room for work between.

``start`` and ``finish`` are two nodes of the autograd graph. In backward their order turns round: ``finish`` starts
the gradients' way back and ``start`` waits for them, so whatever was computed between the two in forward
covers the way back as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import nbytes

OP = "all_to_all"


class Trip:
    """One all-to-all: ``sends[i]`` rows go to member i of the group, ``receives[i]`` come from it."""

    def __init__(self, group: AxisGroup, sends: list[int], receives: list[int]) -> None:
        self.group, self.sends, self.receives = group, sends, receives
        self._work: dist.Work | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        """under way: what is sent, kept so that nobody reuses its memory, and where the rest arrives"""

    def start(self, x: Tensor) -> Tensor:
        """``x [sum(sends), D]`` in group order -> ``[sum(receives), D]``, which holds nothing until ``finish``."""
        out: Tensor = _Start.apply(x, self)
        return out

    def finish(self, out: Tensor) -> Tensor:
        """What ``start`` returned, once its rows are here."""
        done: Tensor = _Finish.apply(out, self)
        return done

    def home(self) -> Trip:
        """The same rows the other way."""
        return type(self)(self.group, self.receives, self.sends)

    def _launch(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        assert self._work is None, "a trip that is under way"
        x = x.contiguous()
        out = x.new_empty(sum(receives), *x.shape[1:])
        self._rows = x, out
        self._work = dist.all_to_all_single(out, x, receives, sends, group=self.group.group, async_op=True)
        return out

    def _land(self) -> Tensor:
        assert self._work is not None, "nothing is under way"
        assert self._rows is not None
        g, (sent, out) = self.group, self._rows
        # As many rows stay here on the way back.
        row = out.element_size() * math.prod(out.shape[1:])
        with g.ledger.span(g.axis, OP, nbytes(sent) - self.sends[g.index] * row):
            self._work.wait()
        self._work = self._rows = None
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip._launch(x, trip.sends, trip.receives)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip._land(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip._land()
        ctx.shape = out.shape
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        trip._launch(grad, trip.receives, trip.sends)
        # Autograd wants the shape that went forward; the rows that arrive, another number, wait in the trip.
        return grad.new_zeros(1).expand(ctx.shape), None


def exchange_counts(counts: Tensor, g: AxisGroup) -> Tensor:
    """``counts [n, ...] int``: slice i goes to member i -> what every member sent here, ``[n, ...]``."""
    counts = counts.contiguous()
    out = torch.empty_like(counts)
    with g.ledger.span(g.axis, "all_to_all_counts", nbytes(counts) * (g.size - 1) // g.size):
        dist.all_to_all_single(out, counts, group=g.group)
    return out
