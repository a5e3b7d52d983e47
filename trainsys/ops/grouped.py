"""Grouped matrix product: rows sorted by expert, each group multiplied by its own weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_ALIGN_BYTES = 16
"""``F.grouped_mm`` takes matrices whose rows start at multiples of this."""
_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``x [T, K]``, ``weight [E, N, K]``, ``counts [E] int`` with sum T -> ``[T, N]``.

    The first ``counts[0]`` rows are multiplied by ``weight[0].T``, the next ``counts[1]`` by ``weight[1].T``,
    and so on; a group may be empty. The weight is cast to x's dtype. One kernel where torch has one for the
    device, dtype and shape, else a loop over the groups, which reads ``counts`` back to the host.
    """
    out: Tensor = _Grouped.apply(x, weight.to(x.dtype), counts)
    return out


def has_values(x: Tensor) -> bool:
    """False for tensors of a dry run, whose numbers nobody knows."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def balanced(total: int, parts: int) -> list[int]:
    """``total`` rows over ``parts`` as evenly as they go: what a dry run takes for granted."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    if not has_values(x) or x.dtype not in _DTYPES.get(x.device.type, ()) or not len(x):
        return False
    return all(n * x.element_size() % _ALIGN_BYTES == 0 for n in weight.shape[1:])


def _sizes(counts: Tensor, total: int) -> list[int]:
    return counts.tolist() if has_values(counts) else balanced(total, len(counts))


class _Grouped(torch.autograd.Function):
    """Own backward: torch's own demands strides of the gradient that autograd does not promise, and fails on
    groups that are all empty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        if _one_kernel(x, weight):
            return F.grouped_mm(
                x.contiguous(), weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32)
            )
        groups = x.split(_sizes(counts, len(x)))
        return torch.cat([rows @ w.T for rows, w in zip(groups, weight, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        if _one_kernel(x, weight):
            ends = counts.cumsum(0, dtype=torch.int32)
            dx = F.grouped_mm(grad, weight.contiguous(), offs=ends) if want_x else None
            dw = F.grouped_mm(grad.T, x.contiguous(), offs=ends) if want_weight else None
            return dx, dw, None
        sizes = _sizes(counts, len(x))
        gs, xs = grad.split(sizes), x.split(sizes)
        dx = torch.cat([g @ w for g, w in zip(gs, weight, strict=True)]) if want_x else None
        dw = torch.stack([g.T @ rows for g, rows in zip(gs, xs, strict=True)]) if want_weight else None
        return dx, dw, None
