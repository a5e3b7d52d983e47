"""Megatron-LM's estimates: of parameters that we count exactly, and as its published formulas say."""

from __future__ import annotations

import pytest

from trainsys.config.run import RunConfig
from trainsys.engines.megatron.theory import estimated_throughput, theoretical_memory
from trainsys.flops import param_counts
from trainsys.layout import Layout
from trainsys.layout.refused.page import run_of


def of(**settings: object) -> tuple[RunConfig, Layout]:
    cfg = run_of({name.replace("__", "."): value for name, value in settings.items()})
    world = Layout.required_world(cfg.parallel)
    assert world is not None
    return cfg, Layout.resolve(cfg.parallel, world)


def test_states_are_18_bytes_a_parameter_of_which_the_distributed_optimizer_shards_12() -> None:
    cfg, layout = of()
    parameters = param_counts(cfg.model).total
    assert theoretical_memory(cfg, layout).states == 18 * parameters
    assert theoretical_memory(*of(parallel__dp_shard=4)).states == (6 + 12 / 4) * parameters
    unsharded = of(parallel__dp_shard=4, megatron__distributed_optimizer=False)
    assert theoretical_memory(*unsharded).states == 18 * parameters
    assert theoretical_memory(*of(parallel__tp=4)).states == 18 * parameters / 4


def test_the_most_loaded_stage_has_its_layers_and_one_embedding() -> None:
    cfg, layout = of(parallel__pp=2)
    embedding = cfg.model.d_model * cfg.model.vocab
    blocks = param_counts(cfg.model).total - 2 * embedding
    assert theoretical_memory(cfg, layout).states == 18 * (blocks / 2 + embedding)


def test_activations_are_those_of_the_paper() -> None:
    """Korthikanti et al. 2022, table 2, per layer; then embedding and logits."""
    cfg, layout = of(parallel__tp=2, recompute__policy="selective")
    m, tokens = cfg.model, cfg.train.seq_len * cfg.train.micro_batch
    layers = m.n_layers * tokens * m.d_model * (18 + 4 * m.d_ff / m.d_model)
    ends = tokens * (8 + m.d_model) + 4 * tokens * m.d_model * (1 + m.vocab / m.d_model)
    assert theoretical_memory(cfg, layout).activations == pytest.approx((layers + ends) / 2)
    plain, _ = of()
    layers = m.n_layers * tokens * m.d_model * (10 + 24)
    ends = tokens * (8 + m.d_model) + 2 * tokens * (m.d_model + m.vocab)
    assert theoretical_memory(plain, Layout()).activations == pytest.approx(1.05 * (layers + ends))


def test_a_pipeline_of_few_micro_batches_holds_less_and_an_interleaved_one_more() -> None:
    full = theoretical_memory(*of(parallel__pp=4)).activations
    few = theoretical_memory(*of(parallel__pp=4, train__micro_batch=12)).activations
    assert few == pytest.approx(full * 12 * 2 / 4)
    inter = {"parallel__pipeline__schedule": "interleaved_1f1b", "parallel__pipeline__virtual_stages": 3}
    assert theoretical_memory(*of(parallel__pp=4, **inter)).activations == pytest.approx(full * (1 + 3 / 12))


def test_throughput_by_forward_time_tells_who_is_slow_where_steps_do_not() -> None:
    """Two ranks of a step of 6 GFLOPs: all end together, one had half the time to itself."""
    assert estimated_throughput(6e9, 1.0, 2) == pytest.approx(1e9)
    assert estimated_throughput(6e9, 2.0, 2) == pytest.approx(0.5e9)
    assert estimated_throughput(6e9, 0.0, 2) == 0.0
