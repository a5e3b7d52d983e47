"""Cross-entropy summed over tokens, with z-loss, on logits that may be sharded over the vocabulary.

With l the logits of a token, y its label and Z = sum_v exp(l_v): nll = log Z - l_y, and the z-loss
z * (log Z)^2 (Chowdhery et al. 2022, PaLM, section 5) keeps log Z near 0. Over a vocabulary split between
ranks only log Z and l_y are communicated: three numbers a token (Shoeybi et al. 2019, Megatron-LM, sec. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.ops import all_reduce_

IGNORE = -100

# Reduces a tensor in place over the ranks that share the vocabulary.
Reduce = Callable[[Tensor, Literal["sum", "max"]], object]

# Elements worked on at once: on CPU a piece stays in the cache, on a device the fp32 copy of bf16 logits
# stays small beside the logits.
_CPU_PIECE = 2**17
_DEVICE_PIECE = 2**26


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, *, z_loss: float = 0.0, group: AxisGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(sum over tokens of nll + z-loss, sum of nll alone, detached), both scalars in fp32 (fp64 for fp64).

    ``logits [B, S, V]`` of any float dtype; ``labels [B, S] int64``, where -100 is left out of both sums.
    ``group``: its rank i holds the i-th of equal, consecutive parts of the vocabulary; labels count over the
    whole of it, and every rank gets the same sums and the gradient of its own part. The backward pass keeps
    no softmax, only the logits themselves and one number a token.
    """
    reduce = None if group is None or group.size == 1 else partial(_all_reduce, group)
    start = 0 if group is None else group.index * logits.shape[-1]
    return VocabCrossEntropy.apply(logits, labels, z_loss, start, reduce)


def _all_reduce(group: AxisGroup, x: Tensor, op: Literal["sum", "max"]) -> None:
    all_reduce_(x, group, op)


class VocabCrossEntropy(torch.autograd.Function):
    """The sums and the gradient for the part of the vocabulary that begins at ``start``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, z_loss: float, start: int, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        rows, labels = logits.flatten(0, -2), labels.flatten()
        valid = labels != IGNORE
        index, mine = _local_index(labels, valid, start, rows.shape[1], sharded=reduce is not None)
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(rows), dtype=wide, device=rows.device)
        for piece in _pieces(rows):
            torch.logsumexp(rows[piece].to(wide), dim=-1, out=lse[piece])
        picked = rows.gather(1, index.unsqueeze(1)).squeeze(1).to(wide) * mine
        if reduce is not None:
            top = lse.clone()
            reduce(top, "max")
            sums = torch.stack((torch.exp(lse - top), picked))
            reduce(sums, "sum")
            lse, picked = top + sums[0].log(), sums[1]
        nll = torch.sum((lse - picked) * valid)
        loss = nll + z_loss * torch.sum(lse.square() * valid) if z_loss else nll.clone()
        ctx.save_for_backward(logits, lse, valid, index, mine)
        ctx.z_loss = z_loss
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, lse, valid, index, mine = ctx.saved_tensors
        rows = logits.flatten(0, -2)
        grad = torch.empty_like(rows)
        # d/dl_v of nll + z lse^2 is (1 + 2 z lse) softmax_v - [v = y].
        on_softmax = (dloss * valid * (1 + 2 * ctx.z_loss * lse)).unsqueeze(1)
        on_label = (-dloss * (valid & mine)).to(lse.dtype).unsqueeze(1)
        for piece in _pieces(rows):
            out = grad[piece]
            part = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
            torch.sub(rows[piece], lse[piece].unsqueeze(1), out=part).exp_().mul_(on_softmax[piece])
            part.scatter_add_(1, index[piece].unsqueeze(1), on_label[piece])
            if part is not out:
                out.copy_(part)
        return grad.view(logits.shape), None, None, None, None


def _local_index(
    labels: Tensor, valid: Tensor, start: int, size: int, *, sharded: bool
) -> tuple[Tensor, Tensor]:
    """Where each label lies in this part of the vocabulary, and whether it does; ignored ones point at 0.

    On an unsharded vocabulary a label out of range is left as it is, so that indexing with it raises.
    """
    if not sharded:
        return labels.masked_fill(~valid, 0), valid
    index = labels - start
    mine = (index >= 0) & (index < size)
    return index.masked_fill(~mine, 0), mine


def _pieces(rows: Tensor) -> Iterator[slice]:
    elements = _CPU_PIECE if rows.device.type == "cpu" else _DEVICE_PIECE
    step = max(1, elements // rows.shape[1])
    for at in range(0, len(rows), step):
        yield slice(at, at + step)
