"""The leaves of the decoder: modules that own a parameter. Shapes come from the weights, not from a config,
so that a tensor-parallel shard of a weight is simply a smaller one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainsys.ops.norm import rms_norm


class Linear(nn.Module):
    """``x [..., in] -> [..., out]`` with weight ``[out, in]``, computed in x's dtype whatever the weight's.

    A master weight in fp32 is cast at use, so bf16 compute needs no autocast.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """``tokens [...] int64 -> [..., D]`` in ``out_dtype``, with weight ``[V, D]``."""

    def __init__(self, vocab: int, d_model: int, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, d_model))
        self.out_dtype = out_dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.out_dtype)


class TiedHead(nn.Module):
    """A head without a weight of its own: it is handed the embedding's. A module so that hooks can attach."""

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight.to(hidden.dtype))


class RMSNorm(nn.Module):
    """RMSNorm over the last dim, with a scale ``[D]``; fp32 inside, x's dtype outside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) over the last dim, with a scale ``[D]`` and, as in PaLM, no bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), None, self.eps)
