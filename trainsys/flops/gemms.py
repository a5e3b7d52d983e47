"""What is multiplied: the matmuls of a layer, and the query-key pairs of attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trainsys.config.model import ModelConfig

Component = Literal["qkv", "attn_out", "ffn", "experts", "shared_experts", "router", "head"]


@dataclass(frozen=True)
class Gemm:
    """One weight product ``[m, k] @ [k, n]`` of the forward pass, over the whole model (no layout applied).

    A token contributes ``rows_per_token`` rows, spread evenly over ``groups`` weights of the same shape, so
    one of the ``groups`` products has ``m = tokens * rows_per_token / groups``. Dense: 1 and 1; routed
    experts: ``top_k`` and ``n_experts``.

    ``tp_dim`` is the side that tensor parallelism cuts ("n": column, "k": row, None: replicated), in pieces
    of ``tp_unit`` that are never split: with more ranks than pieces, pieces repeat (key and value heads).
    """

    name: str
    component: Component
    n: int
    k: int
    groups: int = 1
    rows_per_token: int = 1
    tp_dim: Literal["n", "k"] | None = None
    tp_unit: int = 1

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs a token. The gradients of input and weight cost the same again, each."""
        return 2 * self.rows_per_token * self.n * self.k

    @property
    def params(self) -> int:
        return self.groups * self.n * self.k


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    return model.moe is not None and layer >= model.moe.n_dense_layers


def _ffn_gemms(
    model: ModelConfig, component: Component, hidden: int, groups: int = 1, rows: int = 1
) -> tuple[Gemm, ...]:
    d = model.d_model
    up_names = ("w_gate", "w_up") if model.ffn_kind == "swiglu" else ("w_up",)
    up = tuple(Gemm(name, component, hidden, d, groups, rows, "n") for name in up_names)
    return (*up, Gemm("w_down", component, d, hidden, groups, rows, "k"))


def layer_gemms(model: ModelConfig, layer: int = -1) -> tuple[Gemm, ...]:
    """The weight products of a layer, in the order they run; ``layer`` as in a list, -1 the last.

    Only mixtures with leading dense layers have two kinds of layer. Attention's own two products have no
    weight: they cost ``4 * n_heads * head_dim`` FLOPs a pair (see :func:`causal_pairs`).

    Raises:
        IndexError: there is no such layer.
    """
    layer = range(model.n_layers)[layer]
    d, dh = model.d_model, model.dim_per_head
    q, kv = model.n_heads * dh, model.kv_heads * dh
    attention = (
        Gemm("wq", "qkv", q, d, tp_dim="n", tp_unit=dh),
        Gemm("wk", "qkv", kv, d, tp_dim="n", tp_unit=dh),
        Gemm("wv", "qkv", kv, d, tp_dim="n", tp_unit=dh),
        Gemm("wo", "attn_out", d, q, tp_dim="k", tp_unit=dh),
    )
    moe = model.moe
    if moe is None or not is_moe_layer(model, layer):
        return attention + _ffn_gemms(model, "ffn", model.d_ff)
    router = (Gemm("router", "router", moe.n_experts, d),)
    routed = _ffn_gemms(model, "experts", moe.d_ff, moe.n_experts, moe.top_k)
    shared = _ffn_gemms(model, "shared_experts", moe.shared_hidden) if moe.shared_hidden else ()
    return attention + router + routed + shared


def head_gemm(model: ModelConfig) -> Gemm:
    """The product that makes logits; tied to the embedding or not, it is computed."""
    return Gemm("head", "head", model.vocab, model.d_model, tp_dim="n")


def causal_pairs(seq_len: int, window: int | None = None) -> int:
    """(query, key) pairs that causal attention computes over one document of ``seq_len`` tokens.

    Query i (from 1) sees min(i, window) keys, itself included: n(n+1)/2 without a window.
    """
    w = seq_len if window is None else min(window, seq_len)
    return w * (w + 1) // 2 + (seq_len - w) * w


def packed_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """Pairs where tokens attend only within their own document, given the documents' lengths."""
    return sum(causal_pairs(n, window) for n in lengths)


def row_pairs(seq_len: int, window: int | None = None, document: int | None = None) -> int:
    """Pairs of a row packed of documents of ``document`` tokens each, the last one cut off; None: one document."""
    length = min(document or seq_len, seq_len)
    whole, rest = divmod(seq_len, length)
    return whole * causal_pairs(length, window) + causal_pairs(rest, window)


def full_pairs(seq_len: int) -> int:
    """Pairs of one sequence if causality is ignored, as several published conventions do."""
    return seq_len * seq_len
