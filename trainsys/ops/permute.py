"""Rows to experts and back: gathers in both directions, so that forward and backward have a fixed order of
sums on every device. A *slot* is one choice of one token, numbered ``token * k + choice``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainsys.ops.grouped import has_values


@dataclass(frozen=True)
class Sorted:
    """T tokens' k choices each, sorted by expert and within an expert by token; N rows survive."""

    counts: Tensor
    """``[E] int64`` rows of each expert"""
    slots: Tensor
    """``[N]``: the slot that became a row"""
    rows: Tensor
    """``[T, k]``: the row that a slot became; N and more: none, it was dropped"""
    complete: bool
    """no slot was dropped"""


def sort_by_expert(choices: Tensor, n_experts: int, kept: Tensor | None = None) -> Sorted:
    """``choices [T, k] int64`` of ``n_experts``; ``kept [T, k] bool``: slots that are not dropped (None: all)."""
    if kept is not None and not has_values(kept):
        kept = None  # a dry run drops nothing: how much it would is not known
    experts = choices if kept is None else choices.masked_fill(~kept, n_experts)
    flat = experts.flatten()
    slots = flat.argsort(stable=True)
    rows = invert(slots).view_as(choices)
    # Not bincount, which reads its maximum back from the device.
    counts = flat.new_zeros(n_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:n_experts]
    if kept is not None:
        slots = slots[: int(kept.sum())]
    return Sorted(counts, slots, rows, kept is None)


def invert(order: Tensor) -> Tensor:
    """The permutation that undoes ``order [n]``."""
    out = torch.empty_like(order)
    return out.scatter_(0, order, torch.arange(len(order), device=order.device))


def spread(x: Tensor, by: Sorted) -> Tensor:
    """``x [T, D]`` -> one row a slot, in expert order, ``[N, D]``."""
    out: Tensor = _Spread.apply(x, by)
    return out


def collect(y: Tensor, gates: Tensor, by: Sorted) -> Tensor:
    """``y [N, D]`` in expert order, ``gates [T, k]`` -> each token's gated sum over its choices, ``[T, D]``.

    A dropped choice adds nothing and its gate has no gradient.
    """
    out: Tensor = _Collect.apply(y, gates, by)
    return out


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` for a permutation and its inverse."""
    out: Tensor = _Reorder.apply(x, order, inverse)
    return out


def block_order(sizes: Tensor, blocks: Tensor, total: int) -> Tensor:
    """Which row goes where when blocks of rows change places: ``[total]``, to index rows with.

    ``sizes [n]``: rows of each block as they lie, ``total`` in all. ``blocks [n]``: their new order.
    """
    starts = sizes.cumsum(0) - sizes
    after = sizes[blocks]
    shift = starts[blocks] - (after.cumsum(0) - after)
    return shift.repeat_interleave(after, output_size=total) + torch.arange(total, device=sizes.device)


def _gathered(rows: Tensor, by: Sorted) -> Tensor:
    """``rows [N, D]`` -> ``[T, k, D]``, zeros for dropped slots."""
    if by.complete:
        return rows[by.rows]
    gone = by.rows >= len(rows)
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[by.rows.masked_fill(gone, len(rows))]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Sorted) -> Tensor:
        ctx.by = by
        return x[by.slots // by.rows.shape[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.by).sum(1), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, by: Sorted) -> Tensor:
        ctx.save_for_backward(y, gates)
        ctx.by = by
        return (_gathered(y, by) * gates.to(y.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, gates = ctx.saved_tensors
        by = ctx.by
        dy = grad[by.slots // by.rows.shape[1]] * gates.flatten()[by.slots].to(grad.dtype).unsqueeze(-1)
        dgates = (_gathered(y, by) * grad.unsqueeze(1)).sum(-1, dtype=gates.dtype)
        return dy, dgates, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None
