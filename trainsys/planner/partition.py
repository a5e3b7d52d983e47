"""Parameters of each part of a model and how many layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.planner.cases import Array, Cases


@dataclass(frozen=True)
class Parts:
    """Parameter counts of the whole model, before any sharding."""

    dense_layer: Array  # attention, norms and dense feed-forward of one layer
    moe_dense: Array  # what a MoE layer does not shard over ep: attention, norms, router, shared experts
    experts: Array  # all routed experts of one layer
    embedding: Array


def parts(c: Cases) -> Parts:
    mats = 2.0 + c.glu
    attn = c.attn_params + 2.0 * c.d_model
    shared = mats * c.d_model * c.d_shared + c.d_model * c.n_experts
    return Parts(
        attn + mats * c.d_model * c.d_ff,
        attn + shared,
        mats * c.d_model * c.d_expert * c.n_experts,
        c.vocab * c.d_model,
    )


def total_params(c: Cases) -> Array:
    """Trainable parameters; a tied embedding counts once."""
    p = parts(c)
    n_moe = np.where(c.n_experts > 0, c.n_layers - c.dense_layers, 0.0)
    out: Array = (
        (c.n_layers - n_moe) * p.dense_layer
        + n_moe * (p.moe_dense + p.experts)
        + p.embedding * (2.0 - c.tied)
        + c.d_model
    )
    return out


@dataclass(frozen=True)
class Stages:
    """Layers of the first, the fullest middle and the last stage (equal where pp divides)."""

    first: Array
    middle: Array
    last: Array


def stages(c: Cases) -> Stages:
    """As given, or split as evenly as integers allow, counting embedding and head as ``ends_fewer`` layers each; what
    does not divide is taken from the last stage, then the first."""
    fewer = np.minimum(c.ends_fewer, np.floor(c.n_layers / c.pp))
    full = np.ceil((c.n_layers + 2.0 * fewer) / c.pp)
    spare = full * c.pp - c.n_layers - 2.0 * fewer
    last = np.maximum(full - fewer - np.where(spare > 0, 1.0, 0.0), 0.0)
    first = np.maximum(full - fewer - np.where(spare > 1, 1.0, 0.0), 0.0)
    given = [
        np.where(c.cut_middle > 0, cut, even)
        for cut, even in ((c.cut_first, first), (c.cut_middle, full), (c.cut_last, last))
    ]
    return Stages(*[np.where(c.pp == 1, c.n_layers, layers) for layers in given])


def leading_dense(c: Cases, st: Stages) -> Array:
    """How many layers of the first stage are a mixture's dense ones: they come first, in its first chunk."""
    out: Array = np.where(c.n_experts > 0, np.minimum(c.dense_layers, st.first / c.vpp), 0.0)
    return out
