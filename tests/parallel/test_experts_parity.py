"""A mixture trained under any layout is the mixture trained in one process: experts over ep, with every other axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from support.parity import check
from support.ranks import run_ranks
from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

# Two kinds of layer, a shared expert, experts of a width that one kernel takes and one (d_ff 18) that it does not.
MOE: dict[str, Any] = {"n_experts": 4, "top_k": 2, "d_ff": 24, "n_shared_experts": 1}
STEPS = 2


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    parallel: dict[str, Any]
    axes: tuple[str, ...]
    moe: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    train: dict[str, Any] = field(default_factory=dict)
    layers: int = 2

    def config(self) -> RunConfig:
        train = {"seq_len": 16, "global_batch": 8, "micro_batch": 2, "steps": 10, **self.train}
        return RunConfig(
            model=ModelConfig(
                n_layers=self.layers, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, vocab=72, max_seq_len=64,
                init_std=0.1, moe=MoEConfig(**{**MOE, **self.moe}),
            ),
            parallel=ParallelConfig(**{"dp_shard": 1, **self.parallel}),
            data=DataConfig(source="synthetic", prefetch=0),
            optim=OptimConfig(lr=2e-3, warmup_steps=2),
            recompute=RecomputeConfig(policy=self.recompute),  # type: ignore[arg-type]  # a test's string
            train=TrainConfig(dtype="fp32", device="cpu", **train),
        )  # fmt: skip


EP2, EP4 = {"dp_shard": 4, "ep": 2}, {"dp_shard": 4, "ep": 4}
TWO_LEVEL = {"expert": {"dispatch": "hierarchical", "node_ranks": 2}}
BIAS = {"balance": "bias", "score": "sigmoid", "route_scale": 1.5}
TIGHT = {"capacity_factor": 0.8}
ONE = {"micro_batch": 1}
REPLICAS = {"shard": {"optim": "over_replicas", "grads": "over_replicas"}}
EACH = {"fsdp": {"reduce_each_micro_batch": True}}
CASES = [
    # No ep: a mixture under the other axes.
    Case("ddp2", 2, {"dp_replicate": 2}, ("dp_replicate",), {"n_dense_layers": 1}),
    Case("fsdp4", 4, {"dp_shard": 4}, ("fsdp",)),
    Case("tp2", 2, {"tp": 2, "sequence_parallel": False}, ("tp",)),
    Case("tp2_sp", 2, {"tp": 2}, ("tp",), {"capacity_factor": 0.8}),
    # ep with data parallelism: experts whole on a rank, sharded over expert_fsdp, replicated.
    Case("ep2", 2, {"dp_shard": 2, "ep": 2}, ("ep", "fsdp")),
    Case("fsdp4_ep2", 4, EP2, ("ep", "expert_fsdp", "fsdp")),
    Case("fsdp4_ep4", 4, EP4, ("ep", "fsdp")),
    Case("hsdp_ep2", 4, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, ("ep", "dp_replicate")),
    Case("hsdp_ep2_of_4", 8, {"dp_replicate": 2, **EP2}, ("ep", "expert_fsdp", "dp_replicate"), train=ONE),
    Case("zero2", 4, {**EP2, "fsdp": {"reshard_after_forward": False}}, ("ep", "expert_fsdp")),
    Case("zero2_replicas", 8, {"dp_replicate": 2, **EP2, **REPLICAS}, ("ep", "expert_fsdp", "dp_replicate"), train=ONE),
    Case("reduce_each", 8, {"dp_replicate": 2, **EP2, **EACH}, ("ep", "expert_fsdp", "dp_replicate"),
         train={"global_batch": 16, **ONE}),
    Case("reduce_each_ep4", 4, {**EP4, **EACH}, ("ep", "fsdp"), TIGHT, "full", train=ONE),
    # One expert a rank, which its two sharers cut along another dim.
    Case("few_experts", 4, EP2, ("ep", "expert_fsdp"), {"n_experts": 2, "top_k": 1, "norm_topk": False}),
    # With tp and sp, cp, pp.
    Case("tp2_ep2", 4, {"dp_shard": 2, "tp": 2, "ep": 2, "sequence_parallel": False}, ("ep", "tp"), {"d_ff": 18}),
    Case("tp2_sp_ep2", 4, {"dp_shard": 2, "tp": 2, "ep": 2}, ("ep", "tp"), TIGHT),
    Case("tp2_sp_async_ep2", 4, {"dp_shard": 2, "tp": 2, "ep": 2, "overlap": {"tensor": True}}, ("ep", "tp"),
         {"n_dense_layers": 1}),
    Case("tp2_sp_ep2_of_4", 8, {"dp_shard": 4, "tp": 2, "ep": 2}, ("ep", "tp", "expert_fsdp"), {"n_dense_layers": 1}),
    Case("ring2_ep2", 2, {"cp": 2, "ep": 2}, ("ep", "cp")),
    Case("ring2_ep4_tight", 4, {"cp": 2, "dp_shard": 2, "ep": 4}, ("ep", "cp"), TIGHT),
    Case("ulysses2_ep2", 4, {"cp": 2, "dp_shard": 2, "ep": 2, "context": {"flavour": "ulysses"}}, ("ep", "cp")),
    Case("ring2_tp2_ep4", 8, {"cp": 2, "dp_shard": 2, "tp": 2, "ep": 4}, ("ep", "cp", "tp")),
    Case("pp2_ep2", 4, {"pp": 2, "dp_shard": 2, "ep": 2}, ("ep", "pp")),
    Case("pp2_hsdp_ep2_zb", 8, {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "ep": 2,
         "pipeline": {"schedule": "zero_bubble"}}, ("ep", "pp", "dp_replicate"), train=ONE),
    Case("pp2_ring2_ep4", 8, {"pp": 2, "dp_shard": 2, "cp": 2, "ep": 4}, ("ep", "pp", "cp"), BIAS, train=ONE),
    Case("pp2_ep2_of_4_dualpipev", 8, {"pp": 2, **EP2, "pipeline": {"schedule": "dualpipev"}},
         ("ep", "pp", "expert_fsdp"), {"n_dense_layers": 1}, layers=4, train={"global_batch": 16, **ONE}),
    # Ways to travel, ways to balance, recomputation, micro-batches.
    Case("two_level", 4, {**EP4, **TWO_LEVEL}, ("ep",)),
    Case("two_level_chunks", 4, {"dp_shard": 4, "ep": 4, "expert": {**TWO_LEVEL["expert"], "chunks": 2}}, ("ep",)),
    Case("chunks3", 4, {**EP2, "expert": {"chunks": 3}}, ("ep",), TIGHT),
    Case("chunks_full", 4, {**EP2, "expert": {"chunks": 2}}, ("ep", "expert_fsdp"), BIAS, "full"),
    Case("bias", 4, EP2, ("ep",), BIAS),
    Case("unbalanced", 4, EP2, ("ep",), {"balance": "none", "norm_topk": False}),
    Case("groups", 4, EP2, ("ep",), {"n_experts": 8, "n_groups": 4, "top_groups": 2}),
    Case("tight", 4, EP2, ("ep",), TIGHT),
    Case("full", 4, EP2, ("ep",), TIGHT, "full"),
    Case("selective", 4, EP2, ("ep",), {}, "selective"),
    Case("micro4", 2, {"dp_shard": 2, "ep": 2}, ("ep",), TIGHT, train={"micro_batch": 4}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_answer_as_one_process(case: Case) -> None:
    cfg = case.config()
    assert Layout.resolve(cfg.parallel, case.world).validate(cfg.model, cfg.train, cfg.parallel) == []
    check(cfg, case.world, axes=case.axes, steps=STEPS)


Balance = tuple[dict[str, np.ndarray], dict[str, list[int]]]


def _balance(cfg: RunConfig) -> Balance:
    """(biases by name as a checkpoint sees them, load of the last step) on this rank."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layout = Layout.resolve(cfg.parallel, world)
    mesh = Mesh(layout, torch.device("cpu"))
    engine = NativeEngine(
        cfg, mesh, Recorder(None, here(run_id="balance", rank=rank, world=world), watch_gc=False)
    )
    with Loader(build_source(cfg), layout, rank, cfg.train.micro_batch) as loader:
        for step in range(STEPS):
            engine.train_step(step, next(loader))
    biases = {t.name: t.data.numpy().copy() for t in engine.state() if t.name.endswith(".expert_bias")}
    return biases, {name: load.tolist() for name, load in engine.experts.load().items()}


BALANCED = [
    Case("fsdp4_ep2", 4, EP2, (), {**BIAS, **TIGHT}),
    Case("full", 4, EP2, (), {**BIAS, **TIGHT}, "full"),
    Case("ring2_tp2_ep2", 4, {"cp": 2, "tp": 2, "ep": 2}, (), {**BIAS, **TIGHT}),
    Case("pp2_ep2", 4, {"pp": 2, "dp_shard": 2, "ep": 2}, (), {**BIAS, **TIGHT}),
]


@pytest.mark.parametrize("case", BALANCED, ids=lambda c: c.name)
def test_bias_and_load_are_those_of_the_global_batch(case: Case) -> None:
    cfg = case.config()
    alone = cfg.model_copy(update={"parallel": ParallelConfig(dp_shard=1), "recompute": RecomputeConfig()})
    biases, load = _balance(alone)
    assert len(biases) == len(load) == 2
    rate = cfg.model.moe.bias_update_rate  # type: ignore[union-attr]
    for bias in biases.values():
        assert 0 < np.abs(bias).max() <= STEPS * rate * 1.001
    for counts in load.values():
        assert sum(counts[:-1]) == 8 * 16 * 2  # every choice of every token, dropped or not
        assert 0 < counts[-1] < sum(counts[:-1])
    seen: set[str] = set()
    for rank_biases, rank_load in run_ranks(case.world, _balance, cfg):
        seen |= rank_biases.keys()
        for name, bias in rank_biases.items():
            assert np.array_equal(bias, biases[name]), name
        assert all(counts == load[name] for name, counts in rank_load.items())
    assert seen == biases.keys()


def test_a_step_that_is_turned_down_leaves_the_bias() -> None:
    cfg = Case("one", 1, {}, (), BIAS).config()
    layout = Layout.resolve(cfg.parallel, 1)
    engine = NativeEngine(
        cfg,
        Mesh(layout, torch.device("cpu")),
        Recorder(None, here(run_id="judge", rank=0, world=1), watch_gc=False),
    )
    with Loader(build_source(cfg), layout, 0, 1) as loader:
        engine.train_step(0, next(loader), judge=lambda loss, norm: False)
    assert not any(t.data.any() for t in engine.state() if t.name.endswith(".expert_bias"))
