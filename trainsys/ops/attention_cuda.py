"""The CUDA back ends: FlashAttention-2 for half precision without a mask, the memory-efficient kernel else.

Both are the ops behind ``scaled_dot_product_attention``, called directly because that returns no
log-sum-exp and its autograd could not take the whole row's. Neither draws random numbers: dropout is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainsys.ops.attention_kernels import NEVER, Visible, as_bias

aten = torch.ops.aten


class CudaKernel:
    """Chooses by what each kernel can do: flash knows fp16 and bf16, no mask, head sizes in eights to 256."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        # A random state is returned for dropout alone; backward at dropout 0 accepts any other.
        return (_flash if _flash_serves(q, visible) else _efficient)(q, k, v, visible)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _flash_backward if _flash_serves(q, visible) else _efficient_backward
        return run(dout, q, k, v, out, lse.masked_fill(lse == NEVER, 0.0), visible)


def _flash_serves(q: Tensor, visible: Visible) -> bool:
    return not isinstance(visible, Tensor) and q.dtype != torch.float32 and q.shape[-1] % 8 == 0


def _spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads outside, each kv head repeated for its queries: ``[B, H, S, Dh]``."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _collect(dq: Tensor, dk: Tensor, dv: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: gradients of the repeated heads summed."""
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if group > 1:
        dk, dv = dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)
    return dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*_spread(q, k, v), 0.0, visible == "causal")
    return out.transpose(1, 2), lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(2, dtype=torch.int64, device=q.device)
    grads = aten._scaled_dot_product_flash_attention_backward(
        dout.transpose(1, 2),
        *_spread(q, k, v),
        out.transpose(1, 2),
        lse.contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        visible == "causal",
        unused,
        unused,
    )
    dq, dk, dv = grads
    return _collect(dq, dk, dv, q.shape[2] // k.shape[2])


def _bias(visible: Visible, q: Tensor, k_len: int) -> Tensor | None:
    """A mask as the efficient kernel wants it: one value a head, rows aligned to 16 bytes."""
    if not isinstance(visible, Tensor):
        return None
    bias = as_bias(visible, q.dtype)
    padded = F.pad(bias, (0, -k_len % 8))[..., :k_len]
    return padded.expand(q.shape[0], q.shape[2], q.shape[1], k_len)


def _efficient(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    causal = not isinstance(visible, Tensor) and visible == "causal"
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *_spread(q, k, v), _bias(visible, q, k.shape[1]), True, 0.0, causal
    )
    lse = lse[..., : q.shape[1]]  # the op rounds S up to 32
    if isinstance(visible, Tensor):
        blind = ~visible.any(-1)
        lse = lse.masked_fill(blind, NEVER)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
    return out.transpose(1, 2), lse


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
) -> tuple[Tensor, Tensor, Tensor]:
    causal = not isinstance(visible, Tensor) and visible == "causal"
    rounded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout.transpose(1, 2),
        *_spread(q, k, v),
        _bias(visible, q, k.shape[1]),
        out.transpose(1, 2),
        rounded.contiguous(),
        unused,
        unused,
        0.0,
        [True, True, True, False],
        causal,
    )
    return _collect(dq, dk, dv, q.shape[2] // k.shape[2])
