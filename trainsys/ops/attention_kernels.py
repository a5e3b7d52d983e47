"""Attention of some queries over some keys, forward and backward, with the log-sum-exp in the open.

Blockwise algorithms (ring attention and its kin) call these two directly. Forward gives a block's own output
and log-sum-exp, from which blocks are merged. Backward takes the *whole row's* output and log-sum-exp: the
probabilities exp(scores - lse) are then the true ones, and so is rowsum(dout * out), which every kernel
computes for itself (FlashAttention-2, Dao 2023, algorithm 2; Ring Attention, Liu et al. 2023), so that the
gradients of the blocks simply add up.

Shapes: q, out, dout ``[B, S, H, Dh]``; k, v ``[B, T, K, Dh]``, H a multiple of K; lse ``[B, H, S]`` in fp32
(fp64 for fp64 inputs), -inf where a query sees no key, whose out is 0.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from trainsys.ops.attention import reference_attention

Visible = Literal["all", "causal"] | Tensor
"""Which keys a query sees: all; those up to its own place (S == T); or bool ``[B or 1, 1, S, T]``."""

NEVER = float("-inf")


class Kernel(Protocol):
    """One back end."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        """``out`` in the inputs' dtype, and ``lse``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v through these keys alone, given ``out`` and ``lse`` over all keys."""
        ...


def kernel_for(q: Tensor) -> Kernel:
    """The fastest back end that is exact for every :data:`Visible` on this device."""
    if q.is_cuda:
        from trainsys.ops.attention_cuda import CudaKernel

        return CudaKernel()
    return CpuFlashKernel()


def named_kernel(name: Literal["auto", "flex"]) -> Kernel | None:
    """What ``train.attention`` names; None: the device's own."""
    if name == "auto":
        return None
    from trainsys.ops.attention_flex import FlexKernel

    return FlexKernel()


def as_mask(visible: Visible, q_len: int, k_len: int, device: torch.device) -> Tensor | None:
    """``visible`` as bool, broadcastable to ``[B, H, S, T]``; None: all."""
    if isinstance(visible, Tensor):
        return visible
    if visible == "all":
        return None
    assert q_len == k_len, "causal blocks are square"
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril().view(1, 1, q_len, k_len)


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the scores: 0 or -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, NEVER)


def _is_causal(visible: Visible) -> bool:
    return not isinstance(visible, Tensor) and visible == "causal"


class ReferenceKernel:
    """By the definition; slow, holds all scores, runs anywhere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        mask = as_mask(visible, q.shape[1], k.shape[1], q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        if mask is None:
            mask = torch.ones((), dtype=torch.bool, device=q.device)
        out, lse = reference_attention(q.to(wide), k.to(wide), v.to(wide), mask)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
        mask = as_mask(visible, q.shape[1], k.shape[1], q.device)
        dtypes = (q.dtype, k.dtype, v.dtype)
        dout, q, k, v, out = (t.to(lse.dtype) for t in (dout, q, k, v, out))
        wide_k, wide_v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        scores = torch.einsum("bshd,bthd->bhst", q, wide_k) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, NEVER)
        p = torch.exp(scores - lse.masked_fill(lse == NEVER, 0.0).unsqueeze(-1))
        delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        ds = p * (torch.einsum("bshd,bthd->bhst", dout, wide_v) - delta) * scale
        dq = torch.einsum("bhst,bthd->bshd", ds, wide_k)
        dk = torch.einsum("bhst,bshd->bthd", ds, q).unflatten(2, (-1, group)).sum(3)
        dv = torch.einsum("bhst,bshd->bthd", p, dout).unflatten(2, (-1, group)).sum(3)
        return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


class CpuFlashKernel:
    """torch's blocked kernel for CPUs. It knows grouped heads, and a causal mask skips half the work."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        bias = as_bias(visible, q.dtype) if isinstance(visible, Tensor) else None
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(1, 2) for t in (q, k, v)), 0.0, _is_causal(visible), attn_mask=bias
        )
        if isinstance(visible, Tensor):
            # The op says lse 0 for a query that sees nothing.
            lse = lse.masked_fill(~visible.any(-1), NEVER)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = as_bias(visible, q.dtype) if isinstance(visible, Tensor) else None
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(1, 2) for t in (dout, q, k, v, out)),
            lse.masked_fill(lse == NEVER, 0.0),
            0.0,
            _is_causal(visible),
            attn_mask=bias,
        )
        dq, dk, dv = (g.transpose(1, 2) for g in grads)
        return dq, dk, dv
