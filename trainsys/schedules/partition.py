"""Which layers each pipeline stage holds. Without numpy until a model is cut: light commands import this module."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from trainsys.config.model import ModelConfig
from trainsys.flops import causal_pairs, head_gemm, layer_gemms, layer_params


@dataclass(frozen=True)
class StagePart:
    """Layers ``[first, stop)``, with the embedding, and with the final norm and the head, where it says so."""

    stage: int
    first: int
    stop: int
    embed: bool
    head: bool

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)


def partition(model: ModelConfig, stages: int, seq_len: int) -> list[StagePart]:
    """Cut the layers into ``stages`` consecutive parts of at least one layer each.

    The slowest stage is as fast as can be, in forward FLOPs of a token at ``seq_len``, the head counted with
    the last stage. Among such cuts, that which spreads parameters most evenly (least sum of squares), where
    the embedding counts with the first stage: it multiplies nothing, but it is read, written and held.
    """
    from trainsys.schedules.cut import cut, largest, squares

    assert 1 <= stages <= model.n_layers, "Layout.validate should have refused"
    flops = _flops(model, seq_len)
    params = [float(layer_params(model, i).total) for i in range(model.n_layers)]
    params[0] += model.vocab * model.d_model
    params[-1] += model.vocab * model.d_model + model.d_model
    slowest = cut(flops, stages, largest)[0]
    _, cuts = cut(params, stages, squares, flops, slowest * (1 + 1e-9))
    return [
        StagePart(s, a, b, embed=s == 0, head=s == stages - 1) for s, (a, b) in enumerate(pairwise(cuts))
    ]


def imbalance(model: ModelConfig, stages: int, seq_len: int) -> float:
    """By how much the slowest stage of the best cut is above their mean, in forward FLOPs: 0 where all are equal."""
    from trainsys.schedules.cut import cut, largest

    flops = _flops(model, seq_len)
    return cut(flops, stages, largest)[0] * stages / sum(flops) - 1


def _flops(model: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs of a token by layer, the head with the last."""
    flops, head = layer_flops(model, seq_len)
    flops[-1] += head
    return flops


def layer_flops(model: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Forward FLOPs of a token by layer, and of the head."""
    heads = model.n_heads * model.dim_per_head
    attention = 4 * heads * causal_pairs(seq_len, model.sliding_window) / seq_len
    flops = [
        attention + sum(g.flops_per_token for g in layer_gemms(model, i)) for i in range(model.n_layers)
    ]
    return flops, float(head_gemm(model).flops_per_token)
