"""Causal attention: the mask rule, a slow exact reference, and the fast path over torch's SDPA.

Shapes: queries ``[B, S, H, Dh]``, keys and values ``[B, T, K, Dh]``, H a multiple of K (grouped queries,
Ainslie et al. 2023: query head h reads kv head h // (H/K)). Scores are scaled by 1/sqrt(Dh).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(
    q_len: int,
    k_len: int,
    *,
    window: int | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Which keys each query sees: bool ``[B or 1, 1, S, T]``, or None where plain causality says it all.

    A query at position i sees a key at position j if 0 <= i - j, i - j < ``window`` (so the query itself
    counts) and both are of one document. Positions ``[B or 1, S]`` and ``[B or 1, T]`` are places in the row,
    counted on through document boundaries; without them token t stands at place t. Documents ``[B, S]``,
    ``[B, T]`` are ids, compared for equality only.
    """
    assert (q_positions is None) == (k_positions is None), "positions of queries and keys go together"
    assert (q_docs is None) == (k_docs is None), "documents of queries and keys go together"
    assert q_positions is not None or q_len == k_len, "queries and keys of different length need positions"
    if q_positions is None and q_docs is None and (window is None or window >= q_len):
        return None
    if q_positions is None or k_positions is None:
        if q_docs is not None:
            device = q_docs.device
        q_positions = k_positions = torch.arange(q_len, device=device).unsqueeze(0)
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if q_docs is not None and k_docs is not None:
        visible = visible & (q_docs.unsqueeze(-1) == k_docs.unsqueeze(-2))
    return visible.unsqueeze(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    window: int | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    """Causal attention, ``[B, S, H, Dh]``; every query must see a key.

    ``mask``: what ``attention_mask`` returned for the same arguments, where the caller made it once for many
    layers; else it is made here from the others (see there for their meaning).
    """
    if mask is None:
        mask = attention_mask(
            q.shape[1],
            k.shape[1],
            window=window,
            q_docs=q_docs,
            k_docs=k_docs,
            q_positions=q_positions,
            k_positions=k_positions,
            device=q.device,
        )
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if group > 1 and mask is not None and q.is_cuda:
        # The CUDA kernels that take a mask know no grouped heads; SDPA would fall back to its unfused one.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1
    )
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
