"""The flex_attention back end (Dong et al. 2024): a mask compiled into the kernel, on CUDA.

Which blocks of the square hold anything follows from the first key that each query sees, so a micro-batch's block mask
is made once, on the host, and no mask of all pairs is. On the CPU torch runs its forward unfused and has
no backward for it; there `CpuFlashKernel` does both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from trainsys.ops.attention_rule import Block, Rule, Visible
from trainsys.ops.host_copy import to_device

SIZE = 128
"""Queries, and keys, of a block of the mask."""


def block_mask(block: Block, device: torch.device) -> BlockMask:
    """The same for all layers of a micro-batch: made once."""
    mask: BlockMask = block.once(("flex", device), lambda: _block_mask(block, device))
    return mask


def _block_mask(block: Block, device: torch.device) -> BlockMask:
    """Queries a to b-1 together see the keys ``first(a) .. b-1``, as each sees itself and ``first`` never falls; all
    of them see ``first(b-1) .. a``. Hence which blocks hold anything, and which are full."""
    n, m = len(block.q), len(block.k)
    first = block.first() - block.k.start  # as indices of keys, some before them
    last = np.arange(block.q.start, block.q.stop) - block.k.start
    q_edges, k_edges = (np.append(np.arange(0, x, SIZE), x) for x in (n, m))
    top, bottom = q_edges[:-1], q_edges[1:] - 1
    left, right = k_edges[:-1], k_edges[1:] - 1
    some = (first[:, top, None] <= right) & (last[bottom, None] >= left)
    full = (first[:, bottom, None] <= left) & (last[top, None] >= right)
    # A block that sticks out is masked at its edge.
    full &= (q_edges[1:] - top == SIZE)[:, None] & (k_edges[1:] - left == SIZE)
    first_at, last_at = (to_device(torch.from_numpy(x.astype(np.int32)), device) for x in (first, last))
    rows = len(first)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Rows that are all alike have a batch of 1, whatever b is.
        return (first_at[b % rows, i] <= j) & (j <= last_at[i])

    partial, whole = (_listed(x, device) for x in (some & ~full, full))
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=SIZE, mask_mod=sees, seq_lengths=(n, m))


def _listed(chosen: np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """For bool ``[B, blocks of queries, blocks of keys]``: how many are chosen in each row, and their indices first."""
    order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)[:, None]
    count = chosen.sum(-1).astype(np.int32)[:, None]
    return to_device(torch.from_numpy(count), device), to_device(torch.from_numpy(order), device)


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> BlockMask:
    """The same in every step."""
    return _block_mask(Block(Rule(), range(length), range(length)), device)


class FlexKernel:
    """``compiled`` False: torch's unfused form, slow, for tests."""

    fixed_shapes = True

    def __init__(self, compiled: bool = True) -> None:
        self._run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        mask = None
        if isinstance(visible, Block):
            mask = block_mask(visible, q.device)
        elif visible == "causal":
            mask = _causal(q.shape[1], q.device)
        out, aux = self._run(
            *(t.transpose(1, 2) for t in (q, k, v)),
            block_mask=mask,
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
