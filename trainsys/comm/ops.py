"""Collectives on plain tensors. Each takes an :class:`AxisGroup`, counts itself, and is a no-op on a group of one."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.group import AxisGroup

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed these two; 2.11 has only the older names.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    assert x.shape[dim] % g.size == 0, f"dim {dim} of {tuple(x.shape)} over {g.size} ranks"
    chunk = x.shape[dim] // g.size
    stacked = x.unflatten(dim, (g.size, chunk)).movedim(dim, 0).contiguous()
    out = torch.empty_like(stacked[0])
    with g.ledger.span(g.axis, "reduce_scatter", nbytes(out) * (g.size - 1)):
        reduce_scatter_flat(out.view(-1), stacked.view(-1), group=g.group)
    return out


def broadcast_(x: Tensor, g: AxisGroup, source_index: int = 0) -> Tensor:
    """Copy ``x`` of the rank at ``source_index`` of the group to all, in place."""
    if g.group is None:
        return x
    with g.ledger.span(g.axis, "broadcast", nbytes(x) if g.index == source_index else 0):
        dist.broadcast(x, g.ranks[source_index], group=g.group)
    return x
