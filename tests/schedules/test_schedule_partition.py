"""Stages: consecutive, complete, and none slower than it must be."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.model import ModelConfig
from trainsys.flops import causal_pairs, head_gemm, layer_gemms
from trainsys.schedules.partition import partition


def model(layers: int, vocab: int) -> ModelConfig:
    return ModelConfig(n_layers=layers, d_model=64, n_heads=4, d_ff=128, vocab=vocab, max_seq_len=64)


def slowest(m: ModelConfig, cuts: list[int]) -> float:
    pairs = 4 * m.n_heads * m.dim_per_head * causal_pairs(64) / 64
    layer = pairs + sum(g.flops_per_token for g in layer_gemms(m))
    loads = [layer * (b - a) for a, b in pairwise(cuts)]
    loads[-1] += head_gemm(m).flops_per_token
    return max(loads)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 512, 2048, 8192]))
def test_no_cut_has_a_faster_slowest_stage(layers: int, stages: int, vocab: int) -> None:
    stages = min(stages, layers)
    m = model(layers, vocab)
    parts = partition(m, stages, 64)
    cuts = [0, *(p.stop for p in parts)]
    assert [(p.first, p.stop) for p in parts] == list(pairwise(cuts))
    assert cuts[-1] == layers
    assert all(len(p.layers) >= 1 for p in parts)
    assert [p.embed for p in parts] == [s == 0 for s in range(stages)]
    assert [p.head for p in parts] == [s == stages - 1 for s in range(stages)]
    every = ([0, *inner, layers] for inner in combinations(range(1, layers), stages - 1))
    assert slowest(m, cuts) <= min(slowest(m, c) for c in every) * (1 + 1e-9)


def test_head_and_embedding_weigh() -> None:
    assert [len(p.layers) for p in partition(model(8, 8), 4, 64)] == [2, 2, 2, 2]
    # The head costs as much as several layers, the embedding holds as many parameters.
    assert [len(p.layers) for p in partition(model(8, 2048), 4, 64)] == [1, 3, 3, 1]


def test_128_layers_in_64_stages_take_no_time() -> None:
    assert [len(p.layers) for p in partition(model(128, 8), 64, 64)] == [2] * 64
