"""Attention over keys that come in blocks: how results of blocks add up."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """What sums of ``x`` are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


class Partial:
    """Attention of some queries over the keys seen so far: ``out [B, S, H, Dh]`` and ``lse [B, H, S]``, wide.

    Results over more keys are merged by their log-sum-exp (online softmax, Milakov & Gimelshein 2018).
    """

    def __init__(self, q: Tensor) -> None:
        b, s, h, _ = q.shape
        self.out = torch.zeros_like(q, dtype=wide(q), memory_format=torch.contiguous_format)
        self.lse = torch.full((b, h, s), float("-inf"), dtype=wide(q), device=q.device)

    def merge(self, out: Tensor, lse: Tensor, rows: slice = slice(None)) -> None:
        """Add the result of the queries ``rows`` over more keys."""
        mine = self.lse[..., rows]
        both = torch.logaddexp(mine, lse)
        # Nothing seen on either side: any finite number will do, as both shares are then exp(-inf) = 0.
        scale = both.masked_fill(both == float("-inf"), 0.0)
        kept, added = (
            torch.exp(part - scale).transpose(1, 2).unsqueeze(-1) for part in (mine, lse.to(mine.dtype))
        )
        self.out[:, rows].mul_(kept).add_(added * out)
        mine.copy_(both)
