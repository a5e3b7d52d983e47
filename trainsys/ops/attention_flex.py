"""The flex_attention back end (Dong et al. 2024): a mask compiled into the kernel, on CUDA.

On the CPU torch runs its forward unfused and has no backward for it; there `CpuFlashKernel` does both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from trainsys.ops.attention_kernels import Visible, as_mask


class FlexKernel:
    """``compiled`` False: torch's unfused form, slow, for tests."""

    def __init__(self, compiled: bool = True) -> None:
        self._run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        mask = as_mask(visible, q.shape[1], k.shape[1], q.device)
        block_mask = None
        if mask is not None:

            def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return mask[b % mask.shape[0], 0, i, j]

            block_mask = create_block_mask(
                sees, mask.shape[0], None, q.shape[1], k.shape[1], device=q.device.type
            )
        out, aux = self._run(
            *(t.transpose(1, 2) for t in (q, k, v)),
            block_mask=block_mask,
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
