"""The first products of a tensor-parallel pair: the gradient of their input is summed over the ranks while those of
their weights are computed.

Left to autograd, each product makes both of its gradients before the sum can start, and everybody waits for it
(Megatron-LM starts the sum early as well, for one linear at a time). Here a pair's first linears are one node: their
input's gradients add up inside the products, and the sum of the ranks runs behind what is left to do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.comm import ops
from trainsys.comm.group import AxisGroup
from trainsys.parallel.tensor_overlap import hand_out, linears_of


def enter_pair(pair: nn.Module, group: AxisGroup, gather_dim: int | None) -> None:
    """Compute the first linears of attention or a dense feed-forward before it is called.

    ``gather_dim``: with sequence parallelism, along which the input is gathered first. ``pair.forward`` is unchanged:
    its linears hand out what is ready, and of its input it reads the shape alone.
    """
    first, _ = linears_of(pair)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        outs = _products(x, group, gather_dim, *(linear.weight.to(x.dtype) for linear in first))
        for waiting, linear, out in zip(ready, first, outs, strict=True):
            waiting.append(out if linear.bias is None else out + linear.bias.to(x.dtype))
        return (x.new_empty(1).expand(*outs[0].shape[:2], x.shape[2]), *args[1:])

    ready: list[list[Tensor]] = [[] for _ in first]
    for waiting, linear in zip(ready, first, strict=True):
        linear.forward = partial(hand_out, waiting)  # type: ignore[method-assign]  # names and hooks stay
    pair.register_forward_pre_hook(enter)


# A graph break under torch.compile, as every collective is.
@torch.compiler.disable
def _products(x: Tensor, group: AxisGroup, gather_dim: int | None, *weights: Tensor) -> tuple[Tensor, ...]:
    outs: tuple[Tensor, ...] = _Products.apply(x, group, gather_dim, *weights)
    return outs


class _Products(torch.autograd.Function):
    """``x [B, S, D]`` (or ``[B, S/n, D]``, gathered), weights ``[out, D]`` -> ``[B, S, out]`` each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: AxisGroup, gather_dim: int | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        whole = x if gather_dim is None else ops.all_gather(x, group, gather_dim)
        ctx.save_for_backward(whole, *weights)
        ctx.group, ctx.gather_dim = group, gather_dim
        return tuple(whole @ w.T for w in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        flat = [g.flatten(0, 1) for g in grads]
        d_whole = flat[0] @ weights[0]
        for g, w in zip(flat[1:], weights[1:], strict=True):
            d_whole.addmm_(g, w)
        summing = ops.start_sum(d_whole.view_as(whole), ctx.group, ctx.gather_dim)
        rows = whole.flatten(0, 1)
        d_weights = [g.T @ rows for g in flat]
        return summing.wait(), None, None, *d_weights
