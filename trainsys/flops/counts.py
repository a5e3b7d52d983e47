"""FLOPs of a batch by component, what recomputation adds, and the published ways to count."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops.gemms import Gemm, causal_pairs, full_pairs, head_gemm, layer_gemms
from trainsys.flops.params import param_counts

Convention = Literal["exact", "noncausal", "palm", "megatron"]


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of a batch (or of a token) by component, over all layers; a batch's are exact ints."""

    qkv: float = 0
    attn_scores: float = 0
    attn_values: float = 0
    attn_out: float = 0
    ffn: float = 0
    experts: float = 0
    shared_experts: float = 0
    router: float = 0
    head: float = 0
    recomputed: float = 0
    """Forward FLOPs that backward does a second time; no part of ``forward``."""

    @property
    def forward(self) -> float:
        total: float = sum(getattr(self, f.name) for f in fields(self)) - self.recomputed
        return total

    @property
    def backward(self) -> float:
        """Each product costs two of its size in backward: the gradients of its two factors."""
        return 2 * self.forward

    @property
    def train(self) -> float:
        """Model FLOPs of forward and backward: what MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """Model FLOPs and recomputation: what HFU counts."""
        return self.train + self.recomputed


def layer_is_recomputed(recompute: RecomputeConfig, layer: int) -> bool:
    """Whether backward repeats the whole forward of ``layer`` (index in the model, whatever the stage)."""
    return recompute.policy == "full" or (recompute.policy == "every_n" and layer % recompute.every_n == 0)


def _recomputed(
    model: ModelConfig, tokens: int, attention: int, recompute: RecomputeConfig | None, early_stop: bool
) -> int:
    if recompute is None:
        return 0
    total = model.n_layers * attention if recompute.policy == "selective" else 0
    keeps_attention = recompute.policy == "selective++"
    for layer in range(model.n_layers):
        gemms = layer_gemms(model, layer)
        if keeps_attention or layer_is_recomputed(recompute, layer):
            total += (0 if keeps_attention else attention) + tokens * sum(g.flops_per_token for g in gemms)
            # The last product is left out where nobody needs its output; what is routed is scaled, what is streamed
            # runs as one.
            if early_stop and gemms[-1].component == "ffn" and not recompute.stream_ffn:
                total -= tokens * gemms[-1].flops_per_token
        total += attention if recompute.stream_attention else 0
        total += tokens * sum(_times_streamed(g, recompute) * g.flops_per_token for g in gemms)
    return total


def _times_streamed(gemm: Gemm, recompute: RecomputeConfig) -> int:
    """How often a streamed backward repeats a product: once, but keys and values are made for all queries first."""
    if gemm.component == "ffn":
        return int(recompute.stream_ffn > 0)
    if gemm.component in ("qkv", "attn_out") and recompute.stream_attention:
        return 2 if gemm.name in ("wk", "wv") else 1
    return 0


def batch_flops(
    model: ModelConfig,
    tokens: int,
    attn_pairs: int,
    recompute: RecomputeConfig | None = None,
    *,
    early_stop: bool = True,
) -> ModelFlops:
    """FLOPs of ``tokens`` tokens whose queries see ``attn_pairs`` keys in all, both summed over sequences.

    Args:
        tokens: tokens that go through the layers.
        attn_pairs: (query, key) pairs of one head of one layer: :func:`causal_pairs` times sequences,
            :func:`packed_pairs` with document masks. Grouped queries share keys but multiply as many pairs.
        recompute: what backward repeats. ``selective``: attention's scores and values (Korthikanti et al.
            2022, section 5); ``full``: every layer's forward; ``every_n``: that of every n-th layer, from the
            first. Never the head. None: nothing.
        early_stop: a recomputed dense layer's last product is not repeated, since no gradient needs its
            result: torch's non-reentrant checkpoint stops there. False: the layer is repeated whole.
    """
    heads = model.n_heads * model.dim_per_head
    per_product = 2 * heads * attn_pairs
    totals: dict[str, int] = {}
    for layer in range(model.n_layers):
        for g in layer_gemms(model, layer):
            totals[g.component] = totals.get(g.component, 0) + tokens * g.flops_per_token
    totals["head"] = tokens * head_gemm(model).flops_per_token
    return ModelFlops(
        attn_scores=model.n_layers * per_product,
        attn_values=model.n_layers * per_product,
        recomputed=_recomputed(model, tokens, 2 * per_product, recompute, early_stop),
        **totals,
    )


def token_flops(
    model: ModelConfig, seq_len: int, recompute: RecomputeConfig | None = None, *, causal: bool = True
) -> ModelFlops:
    """FLOPs of the average token of an unpacked sequence of ``seq_len`` tokens.

    ``causal=False`` counts every key for every query and no window: what several publications count.
    """
    pairs = causal_pairs(seq_len, model.sliding_window) if causal else full_pairs(seq_len)
    batch = batch_flops(model, seq_len, pairs, recompute)
    return ModelFlops(**{f.name: getattr(batch, f.name) / seq_len for f in fields(batch)})


def train_flops_per_token(model: ModelConfig, seq_len: int, convention: Convention = "exact") -> float:
    """Training FLOPs a token by a named convention, the sequence being one document of ``seq_len`` tokens.

    - ``exact``: 3 x forward; attention counts the pairs that causality and the window leave.
    - ``noncausal``: the same with seq_len^2 pairs: the model FLOPs of Korthikanti et al. 2022, appendix A.
    - ``palm``: 6N + 12LHQT (Chowdhery et al. 2022, appendix B), non-causal. N is every parameter but an
      untied input embedding, which multiplies nothing: PaLM ties its own, and its published 46.2% MFU needs
      the table in N once. For a mixture of experts N is the active parameters.
    - ``megatron``: eq. 3 of Narayanan et al. 2021, 96Bslh^2 (1 + s/6h + V/16lh), for any FFN and grouping:
      non-causal *hardware* FLOPs with full recomputation, so layers count 4 x forward and logits 3 x.
    """
    if convention == "exact":
        return token_flops(model, seq_len).train
    if convention == "palm":
        counts = param_counts(model)
        n = counts.active if model.tied_embeddings else counts.active - counts.embedding
        return 6 * n + 12 * model.n_layers * model.n_heads * model.dim_per_head * seq_len
    flops = token_flops(model, seq_len, causal=False)
    if convention == "noncausal":
        return flops.train
    assert convention == "megatron", convention
    return 4 * (flops.forward - flops.head) + 3 * flops.head
