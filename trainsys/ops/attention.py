"""Causal attention: a slow exact reference, and the fast path over torch's SDPA where causality is all there is.

Shapes: queries ``[B, S, H, Dh]``, keys and values ``[B, T, K, Dh]``, H a multiple of K (grouped queries,
Ainslie et al. 2023: query head h reads kv head h // (H/K)). Scores are scaled by 1/sqrt(Dh).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token i sees tokens 0 to i: ``[B, S, H, Dh]``. What else there may be to a mask is in `attention_rule`."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, in the dtype given: ``out [B, S, H, Dh]`` and ``lse [B, H, S]``.

    ``visible``: bool, broadcastable to ``[B, H, S, T]``; None: causal, S == T. A query that sees no key has
    out 0 and lse -inf, which is the neutral element when partial results are merged.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    if visible is None:
        assert q.shape[1] == k.shape[1]
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return torch.einsum("bhst,bthd->bshd", weights, v), lse
