"""The flex_attention back end (Dong et al. 2024): a mask compiled into the kernel, on CUDA.

On the CPU torch runs its forward unfused and has no backward for it; there `CpuFlashKernel` does both.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from trainsys.ops.attention_kernels import Visible


def _block_mask(visible: Visible, q_len: int, k_len: int, device: torch.device) -> BlockMask | None:
    if isinstance(visible, Tensor):
        # One mask for all rows has a batch of 1, whatever b is.
        rows = visible.shape[0]
        return create_block_mask(
            lambda b, h, i, j: visible[b % rows, 0, i, j], rows, None, q_len, k_len, device=device
        )
    return None if visible == "all" else _causal(q_len, device)


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> BlockMask:
    """The same for every layer, and no mask of ``length**2`` in memory."""
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


class FlexKernel:
    """``compiled`` False: torch's unfused form, slow, for tests."""

    def __init__(self, compiled: bool = True) -> None:
        self._run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        out, aux = self._run(
            *(t.transpose(1, 2) for t in (q, k, v)),
            block_mask=_block_mask(visible, q.shape[1], k.shape[1], q.device),
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=True),
        )
        return out.transpose(1, 2), aux.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By autograd through a second forward of this block, whose log-sum-exp is differentiable: with
        w = exp(own lse - lse) the row's out is sum(w * own out), so d own out = w dout and
        d own lse = w dout . (own out - out). Raises NotImplementedError on the CPU."""
        # torch has none there (2.13). A run is refused long before (`train.process`); this is for other callers.
        if not q.is_cuda:
            raise NotImplementedError("flex_attention has no backward on the CPU; use CpuFlashKernel")
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            own, own_lse = self.forward(inputs[0], inputs[1], inputs[2], visible)
        w = torch.exp(own_lse.detach() - lse).nan_to_num(0.0)
        weighted = dout * w.transpose(1, 2).unsqueeze(-1).to(dout.dtype)
        d_lse = (weighted.to(lse.dtype) * (own.detach() - out).to(lse.dtype)).sum(-1).transpose(1, 2)
        dq, dk, dv = torch.autograd.grad((own, own_lse), inputs, (weighted, d_lse))
        return dq, dk, dv
