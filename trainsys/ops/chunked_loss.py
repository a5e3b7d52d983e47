"""Head and cross-entropy in one, a piece of the sequence at a time: the full logits never exist.

Logits of a long sequence over a large vocabulary outweigh everything else a step holds. Their gradient is known
as soon as they are, so each piece is made, turned into gradients of its hidden states and of the head's weight,
and dropped, all in forward (as StreamBP, Luo et al. 2025, does for the head). Nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.ops.loss import cross_entropy_sum


def chunked_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    z_loss: float = 0.0,
    group: AxisGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`cross_entropy_sum` of ``hidden @ weight.T``, holding logits of ``chunk`` tokens a row at most.

    ``hidden [B, S, D]``, ``weight [V, D]`` (this rank's part of the vocabulary under ``group``), ``labels
    [B, S]``. Keeps one gradient of the shape of ``hidden`` and one of ``weight`` until backward.
    """
    loss, nll = _Chunked.apply(hidden, weight, labels, chunk, z_loss, group)
    return loss, nll


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        z_loss: float,
        group: AxisGroup | None,
    ) -> tuple[Tensor, Tensor]:
        assert chunk > 0
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        cast = weight.detach().to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if needed else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed else None
        losses, nlls = [], []
        for start in range(0, hidden.shape[1], chunk):
            piece = slice(start, start + chunk)
            rows = hidden[:, piece].detach()
            logits = (rows @ cast.T).requires_grad_(needed)
            with torch.enable_grad():
                loss, nll = cross_entropy_sum(logits, labels[:, piece], z_loss=z_loss, group=group)
            losses.append(loss.detach())
            nlls.append(nll)
            if d_hidden is not None and d_weight is not None:
                (d_logits,) = torch.autograd.grad(loss, logits)
                d_hidden[:, piece] = d_logits @ cast
                d_weight += d_logits.flatten(0, 1).T @ rows.flatten(0, 1)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        nll = torch.stack(nlls).sum()
        ctx.mark_non_differentiable(nll)
        return torch.stack(losses).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * dloss.to(d_hidden.dtype), (d_weight * dloss).to(ctx.dtype), None, None, None, None)
