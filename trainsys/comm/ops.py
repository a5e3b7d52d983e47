"""Collectives on plain tensors. Each takes an :class:`AxisGroup`, counts itself, and is a no-op on a group of one."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.flat import all_gather_flat, reduce_scatter_flat
from trainsys.comm.group import AxisGroup

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def all_reduce_(x: Tensor, g: AxisGroup, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Reduce ``x`` over the group, in place; returns ``x``."""
    if g.group is None:
        return x
    assert x.is_contiguous(), "all_reduce_ works in place: the tensor must be contiguous"
    with g.ledger.span(g.axis, "all_reduce", 2 * nbytes(x) * (g.size - 1) // g.size):
        dist.all_reduce(x, REDUCE_OPS[op], group=g.group)
    return x


def all_gather(x: Tensor, g: AxisGroup, dim: int) -> Tensor:
    """Concatenate every rank's ``x`` along ``dim``, in group order. All shapes must be equal."""
    if g.group is None:
        return x
    x = x.contiguous()
    shape = (*x.shape[:dim], g.size * x.shape[dim], *x.shape[dim + 1 :])
    in_order = math.prod(x.shape[:dim]) == 1  # then the ranks' parts lie one after the other
    out = x.new_empty(shape if in_order else (g.size, *x.shape))
    with g.ledger.span(g.axis, "all_gather", nbytes(x) * (g.size - 1)):
        all_gather_flat(out.view(-1), x.view(-1), group=g.group)
    return out if in_order else out.movedim(0, dim).reshape(shape)


def reduce_scatter(x: Tensor, g: AxisGroup, dim: int) -> Tensor:
    """Sum ``x`` over the group and keep this rank's chunk along ``dim``; its size must divide evenly."""
    if g.group is None:
        return x
    stacked, out = _parts(x, g, dim)
    with g.ledger.span(g.axis, "reduce_scatter", nbytes(out) * (g.size - 1)):
        reduce_scatter_flat(out.view(-1), stacked.view(-1), group=g.group)
    return out


def _parts(x: Tensor, g: AxisGroup, dim: int) -> tuple[Tensor, Tensor]:
    """``x`` as the ranks' chunks of ``dim``, one after the other, and a place for one of them."""
    assert x.shape[dim] % g.size == 0, f"dim {dim} of {tuple(x.shape)} over {g.size} ranks"
    stacked = x.unflatten(dim, (g.size, x.shape[dim] // g.size)).movedim(dim, 0).contiguous()
    return stacked, torch.empty_like(stacked[0])


class Summing:
    """A sum over the group that goes on in the background; counted when it is waited for."""

    def __init__(self, result: Tensor, work: dist.Work, g: AxisGroup, op: str, sent_bytes: int) -> None:
        self._result, self._work = result, work
        self._counted = g, op, sent_bytes

    def wait(self) -> Tensor:
        g, op, sent_bytes = self._counted
        with g.ledger.span(g.axis, op, sent_bytes):
            self._work.wait()
        return self._result


def start_sum(x: Tensor, g: AxisGroup, dim: int | None) -> Summing:
    """Start what `all_reduce_` does (``dim`` None) or `reduce_scatter` along ``dim``; nobody may touch ``x`` until
    it has been waited for. The group is one of several ranks."""
    assert g.group is not None
    if dim is None:
        assert x.is_contiguous(), "summed in place: the tensor must be contiguous"
        work = dist.all_reduce(x, group=g.group, async_op=True)
        return Summing(x, work, g, "all_reduce", 2 * nbytes(x) * (g.size - 1) // g.size)
    stacked, out = _parts(x, g, dim)
    work = reduce_scatter_flat(out.view(-1), stacked.view(-1), group=g.group, async_op=True)
    return Summing(out, work, g, "reduce_scatter", nbytes(out) * (g.size - 1))


def broadcast_(x: Tensor, g: AxisGroup, source_index: int = 0) -> Tensor:
    """Copy ``x`` of the rank at ``source_index`` of the group to all, in place."""
    if g.group is None:
        return x
    with g.ledger.span(g.axis, "broadcast", nbytes(x) if g.index == source_index else 0):
        dist.broadcast(x, g.ranks[source_index], group=g.group)
    return x
