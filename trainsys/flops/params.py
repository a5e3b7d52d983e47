"""Parameters of a model by part, in all and active (touched by one token)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainsys.config.model import ModelConfig
from trainsys.flops.gemms import head_gemm, layer_gemms


@dataclass(frozen=True)
class ParamCounts:
    """Counts, not bytes. ``head`` is 0 where it is tied to the embedding. Biases count with their matrix."""

    embedding: int = 0
    attention: int = 0
    ffn: int = 0
    experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    head: int = 0
    inactive: int = 0
    """Parameters among ``experts`` that a token does not visit."""

    @property
    def total(self) -> int:
        counts: list[int] = [getattr(self, f.name) for f in fields(self)]
        return sum(counts) - self.inactive

    @property
    def active(self) -> int:
        return self.total - self.inactive

    def __add__(self, other: ParamCounts) -> ParamCounts:
        return ParamCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def layer_params(model: ModelConfig, layer: int = -1) -> ParamCounts:
    """Parameters of one layer, its norms included; ``layer`` as in a list, -1 the last."""
    layer = range(model.n_layers)[layer]
    by_component: dict[str, int] = {}
    inactive = 0
    for g in layer_gemms(model, layer):
        by_component[g.component] = by_component.get(g.component, 0) + g.params
        inactive += (g.groups - g.rows_per_token) * g.n * g.k
    bias = (model.n_heads + 2 * model.kv_heads) * model.dim_per_head if model.qkv_bias else 0
    # Every norm has a scale and no bias. A parallel block feeds attention and FFN from one norm.
    norms = model.d_model * (1 if model.parallel_block else 2)
    return ParamCounts(
        attention=by_component["qkv"] + by_component["attn_out"] + bias,
        ffn=by_component.get("ffn", 0),
        experts=by_component.get("experts", 0),
        shared_experts=by_component.get("shared_experts", 0),
        router=by_component.get("router", 0),
        norms=norms + (2 * model.dim_per_head if model.qk_norm else 0),
        inactive=inactive,
    )


def param_counts(model: ModelConfig) -> ParamCounts:
    """Parameters of the whole model."""
    counts = ParamCounts(
        embedding=model.vocab * model.d_model,
        norms=model.d_model,
        head=0 if model.tied_embeddings else head_gemm(model).params,
    )
    for layer in range(model.n_layers):
        counts += layer_params(model, layer)
    return counts
