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
from trainsys.ops.attention_pieces import NEVER, backward_pieces, forward_pieces
from trainsys.ops.attention_rule import Band, Block, Plain, Visible


class Kernel(Protocol):
    """One back end."""

    fixed_shapes: bool
    """Compiled anew for each shape, and so given spans whole, where others get the part in which anything is visible."""

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
    """``visible`` as bool, broadcastable to ``[B, H, S, T]``; None: all. For the reference and for tests."""
    if isinstance(visible, Block):
        return visible.mask(device)
    if visible == "all":
        return None
    assert q_len == k_len, "causal blocks are square"
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril().view(1, 1, q_len, k_len)


def as_bias(sees: Plain | Band, q: Tensor, keys: int) -> Tensor | None:
    """A band as what is added to the scores, 0 or -inf, of q's dtype: ``[1, 1, S, T]``."""
    if not isinstance(sees, Band):
        return None
    seen = sees.mask(q.shape[1], keys, q.device)
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, NEVER)


class ReferenceKernel:
    """By the definition; slow, holds all scores, runs anywhere."""

    fixed_shapes = False

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
    """torch's blocked kernel for CPUs. It knows grouped heads, and a causal mask skips half the work.

    It takes no documents: each is a call of its own, and so costs what it holds.
    """

    fixed_shapes = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        if isinstance(visible, Block):
            return forward_pieces(_cpu_forward, q, k, v, visible)
        return _cpu_forward(q, k, v, visible)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A query that sees nothing at all has a gradient of 0, and so may have any finite log-sum-exp.
        lse = lse.masked_fill(lse == NEVER, 0.0)
        if isinstance(visible, Block):
            return backward_pieces(_cpu_backward, dout, q, k, v, out, lse, visible)
        return _cpu_backward(dout, q, k, v, out, lse, visible)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, sees: Plain | Band) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.transpose(1, 2) for t in (q, k, v)), 0.0, sees == "causal", attn_mask=as_bias(sees, q, k.shape[1])
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Plain | Band
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.transpose(1, 2) for t in (dout, q, k, v, out)),
        lse,
        0.0,
        sees == "causal",
        attn_mask=as_bias(sees, q, k.shape[1]),
    )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv
