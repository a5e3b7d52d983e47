"""The four conjugate pairs of collectives that tensor and sequence parallelism are made of.

In the notation of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022): ``copy`` is f, ``reduce``
is f-bar, ``gather`` is g and ``scatter_sum`` is g-bar. Each is the other's backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup) -> Tensor:
        ctx.g = g
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ops.all_reduce_(grad.contiguous(), ctx.g), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup) -> Tensor:
        # The input is the fresh output of a linear that nobody else reads: reduced in place.
        ctx.mark_dirty(x)
        return ops.all_reduce_(x, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup, dim: int) -> Tensor:
        ctx.g, ctx.dim = g, dim
        return ops.all_gather(x, g, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ops.reduce_scatter(grad, ctx.g, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup, dim: int) -> Tensor:
        ctx.g, ctx.dim = g, dim
        return ops.reduce_scatter(x, g, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ops.all_gather(grad, ctx.g, ctx.dim), None, None


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: AxisGroup, dim: int) -> Tensor:
        ctx.g, ctx.dim = g, dim
        return ops.all_gather(x, g, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        chunk = grad.shape[ctx.dim] // ctx.g.size
        return grad.narrow(ctx.dim, ctx.g.index * chunk, chunk).contiguous(), None, None


# Graph breaks under torch.compile: what lies between two collectives is compiled, they are not.
@torch.compiler.disable
def copy(x: Tensor, g: AxisGroup) -> Tensor:
    """Identity; backward sums the gradient over the group."""
    return x if g.group is None else _Copy.apply(x, g)


@torch.compiler.disable
def reduce(x: Tensor, g: AxisGroup) -> Tensor:
    """Sum over the group, in place; backward is the identity."""
    return x if g.group is None else _Reduce.apply(x, g)


@torch.compiler.disable
def gather(x: Tensor, g: AxisGroup, dim: int) -> Tensor:
    """Concatenate along ``dim``; backward sums over the group and keeps the own chunk."""
    return x if g.group is None else _Gather.apply(x, g, dim)


@torch.compiler.disable
def scatter_sum(x: Tensor, g: AxisGroup, dim: int) -> Tensor:
    """Sum over the group, keep the own chunk of ``dim``; backward concatenates."""
    return x if g.group is None else _ScatterSum.apply(x, g, dim)


@torch.compiler.disable
def concat(x: Tensor, g: AxisGroup, dim: int) -> Tensor:
    """Concatenate along ``dim`` where every rank then computes the same: backward keeps the own chunk."""
    return x if g.group is None else _Concat.apply(x, g, dim)
