"""Which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainsys.config.model import ModelConfig
from trainsys.flops import causal_pairs, head_gemm, layer_gemms, layer_params

Array = NDArray[np.float64]


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
    assert 1 <= stages <= model.n_layers, "Layout.validate should have refused"
    flops = _flops(model, seq_len)
    params = [float(layer_params(model, i).total) for i in range(model.n_layers)]
    params[0] += model.vocab * model.d_model
    params[-1] += model.vocab * model.d_model + model.d_model
    slowest = _cut(flops, stages, np.maximum)[0]
    _, cuts = _cut(params, stages, lambda rest, part: rest + part * part, flops, slowest * (1 + 1e-9))
    return [
        StagePart(s, a, b, embed=s == 0, head=s == stages - 1) for s, (a, b) in enumerate(pairwise(cuts))
    ]


def imbalance(model: ModelConfig, stages: int, seq_len: int) -> float:
    """By how much the slowest stage of the best cut is above their mean, in forward FLOPs: 0 where all are equal."""
    flops = _flops(model, seq_len)
    return _cut(flops, stages, np.maximum)[0] * stages / sum(flops) - 1


def _flops(model: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs of a token by layer, the head with the last."""
    heads = model.n_heads * model.dim_per_head
    attention = 4 * heads * causal_pairs(seq_len, model.sliding_window) / seq_len
    flops = [
        attention + sum(g.flops_per_token for g in layer_gemms(model, i)) for i in range(model.n_layers)
    ]
    flops[-1] += head_gemm(model).flops_per_token
    return flops


def _cut(
    costs: Sequence[float],
    parts: int,
    fold: Callable[[Array, Array], Array],
    others: Sequence[float] = (),
    limit: float = float("inf"),
) -> tuple[float, list[int]]:
    """The places ``[0, …, n]`` that cut ``costs`` into non-empty parts at the smallest value, and that value.

    ``fold(value of the parts before, sum of a part)``, growing in both, gives the value. No part's sum of
    ``others`` may pass ``limit``. Dynamic programming over (parts, items): exact.
    """
    n = len(costs)
    part = _sums(costs)
    allowed = np.triu(np.ones((n + 1, n + 1), bool), 1)
    if others:
        allowed &= _sums(others) <= limit
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(parts):
        value = np.where(allowed, fold(best[:, None], part), np.inf)
        choices.append(n - np.argmin(value[::-1], axis=0))  # of equal ones the last
        best = value[choices[-1], np.arange(n + 1)]
    cuts = [n]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return float(best[n]), cuts[::-1]


def _sums(costs: Sequence[float]) -> Array:
    """[i, j]: the sum of items i to j - 1."""
    total = np.concatenate([[0.0], np.cumsum(costs)])
    out: Array = total[None, :] - total[:, None]
    return out
