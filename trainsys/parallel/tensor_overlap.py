"""Tensor parallelism whose communication hides behind its products: async TP, on any backend.

With sequence parallelism an all-gather stands before the first products of a pair and a reduce-scatter behind the
last. Both are taken apart (Wang et al. 2023, Overlap communication with dependent computation via decomposition):
while the product with one member's part of the sequence runs, the next part travels round the ring. Each is the
other's backward. Bytes and what is kept for backward are those of the collectives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.comm.p2p import Link
from trainsys.comm.ring import gathered, summed
from trainsys.models.attention import Attention
from trainsys.models.layers import Linear


def overlap_pair(pair: nn.Module, link: Link) -> None:
    """Make attention or a dense feed-forward gather its input while it multiplies, and its output likewise.

    ``pair.forward`` is unchanged. Its first linears are computed before it is called and hand out what is ready; in
    place of the input it gets a placeholder of the gathered shape, of which it reads the shape alone.
    """
    first, last = linears_of(pair)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        outs = _GatheredProducts.apply(x, link, *(linear.weight.to(x.dtype) for linear in first))
        for waiting, linear, out in zip(ready, first, outs, strict=True):
            waiting.append(out if linear.bias is None else out + linear.bias.to(x.dtype))
        b, s, width = x.shape
        return (x.new_empty(1).expand(b, link.group.size * s, width), *args[1:])

    ready: list[list[Tensor]] = [[] for _ in first]
    for waiting, linear in zip(ready, first, strict=True):
        linear.forward = partial(hand_out, waiting)  # type: ignore[method-assign]  # names and hooks stay
    last.forward = partial(_leave, last, link)  # type: ignore[method-assign]
    pair.register_forward_pre_hook(enter)


def linears_of(pair: nn.Module) -> tuple[list[Linear], Linear]:
    """Those that read the input of the pair, and the one that makes its output."""
    if isinstance(pair, Attention):
        return [pair.wq, pair.wk, pair.wv], pair.wo
    linears: list[Linear] = [m for m in pair.children() if isinstance(m, Linear)]
    assert len(linears) >= 2, f"{type(pair).__name__} is no dense feed-forward"
    return linears[:-1], linears[-1]


def hand_out(waiting: list[Tensor], placeholder: Tensor) -> Tensor:
    """In place of a linear's forward: what was computed for it."""
    return waiting.pop()


def _leave(linear: Linear, link: Link, x: Tensor) -> Tensor:
    assert linear.bias is None, "it would be added once a member"
    out: Tensor = _SummedProduct.apply(x, linear.weight.to(x.dtype), link)
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [B, s, in] weight [in, out]``. Tests put work that sleeps in its place."""
    return x @ weight


class _GatheredProducts(torch.autograd.Function):
    """``x [B, S/n, D]``, weights ``[out, D]`` -> ``[B, S, out]`` each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Link, *weights: Tensor) -> tuple[Tensor, ...]:
        b, s, width = x.shape
        n = link.group.size
        whole = x.new_empty(b, n * s, width)
        outs = tuple(x.new_empty(b, n * s, len(w)) for w in weights)
        for i, part in gathered(x, link):
            at = slice(i * s, (i + 1) * s)
            whole[:, at] = part
            for out, w in zip(outs, weights, strict=True):
                out[:, at] = product(part, w.T)
        ctx.save_for_backward(whole, *weights)
        ctx.link = link
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        s = whole.shape[1] // ctx.link.group.size

        def part(i: int) -> Tensor:
            first, *rest = (
                product(g[:, i * s : (i + 1) * s], w) for g, w in zip(grads, weights, strict=True)
            )
            for other in rest:
                first += other
            return first

        d_x = summed(part, ctx.link)
        return d_x, None, *(g.flatten(0, 1).T @ whole.flatten(0, 1) for g in grads)


class _SummedProduct(torch.autograd.Function):
    """``x [B, S, in]``, weight ``[D, in]`` -> this member's part of the sum, ``[B, S/n, D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.link = link
        s = x.shape[1] // link.group.size
        return summed(lambda i: product(x[:, i * s : (i + 1) * s], weight.T), link)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        s = grad.shape[1]
        d_x = torch.empty_like(x)
        # Parts add up in fp32, as they would inside one product.
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for i, part in gathered(grad, ctx.link):
            at = slice(i * s, (i + 1) * s)
            d_x[:, at] = product(part, weight)
            d_weight += part.flatten(0, 1).T @ x[:, at].flatten(0, 1)
        return d_x, d_weight.to(weight.dtype), None
