"""The decoder written a second time, plainly: one row, one head and one query at a time, rotation by complex
numbers, nothing shared with trainsys.models but the parameter names and the rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainsys.config.model import ModelConfig
from trainsys.models.rope import inverse_frequencies


def decoder(
    p: Mapping[str, Tensor], cfg: ModelConfig, tokens: Tensor, positions: Tensor, docs: Tensor | None
):
    """Logits ``[B, S, V]`` in the dtype of the parameters ``p`` (canonical name -> tensor)."""
    rows = range(len(tokens))
    return torch.stack(
        [_row(p, cfg, tokens[b], positions[b], None if docs is None else docs[b]) for b in rows]
    )


def _row(p, cfg, tokens, positions, docs):
    x = p["embed.weight"][tokens]
    for i in range(cfg.n_layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if k.startswith(f"layers.{i}.")}
        normed = _norm(cfg, x, layer["attn_norm.weight"])
        after = x + _attention(layer, cfg, normed, positions, docs)
        x = after + _ffn(
            layer, cfg, normed if cfg.parallel_block else _norm(cfg, after, layer["ffn_norm.weight"])
        )
    x = _norm(cfg, x, p["norm.weight"])
    return x @ p["embed.weight" if cfg.tied_embeddings else "head.weight"].T


def _rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _norm(cfg, x, weight):
    return _rms(x - x.mean(-1, keepdim=True) if cfg.norm == "layernorm" else x, weight, cfg.norm_eps)


def _linear(layer, name, x):
    bias = layer.get(f"{name}.bias")
    return x @ layer[f"{name}.weight"].T + (0 if bias is None else bias)


def _attention(layer, cfg, x, positions, docs):
    d, n, freqs = cfg.dim_per_head, len(x), inverse_frequencies(cfg.rope, cfg.dim_per_head)
    turn = cfg.rope.temperature * torch.exp(
        1j * positions[:, None] * torch.tensor(freqs, dtype=torch.float64)
    )

    def head(name, norm, h):
        y = _linear(layer, f"attn.{name}", x)[:, h * d : (h + 1) * d]
        if norm is None:
            return y
        if cfg.qk_norm:
            y = _rms(y, layer[f"attn.{norm}.weight"], cfg.norm_eps)
        z = torch.complex(y[:, : d // 2], y[:, d // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)

    outs = []
    for h in range(cfg.n_heads):
        kv = h // (cfg.n_heads // cfg.kv_heads)
        q, k, v = head("wq", "q_norm", h), head("wk", "k_norm", kv), head("wv", None, kv)
        queries = []
        for i in range(n):
            seen = [
                j
                for j in range(i + 1)
                if (cfg.sliding_window is None or i - j < cfg.sliding_window)
                and (docs is None or docs[i] == docs[j])
            ]
            weights = torch.softmax(k[seen] @ q[i] / math.sqrt(d), 0)
            queries.append(weights @ v[seen])
        outs.append(torch.stack(queries))
    return _linear(layer, "attn.wo", torch.cat(outs, -1))


def _ffn(layer, cfg, x):
    up = _linear(layer, "ffn.w_up", x)
    if cfg.ffn_kind == "gelu":
        hidden = up / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        gate = _linear(layer, "ffn.w_gate", x)
        hidden = gate / (1 + torch.exp(-gate)) * up
    return _linear(layer, "ffn.w_down", hidden)
