"""Gradients and optimizer states over replicas: what each rank keeps and sends. That the answer is the same is in
the parity tests."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from support.ranks import run_ranks
from trainsys.config.model import ModelConfig
from trainsys.config.run import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.optim.local import local_grad
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import ParallelModel
from trainsys.parallel.replica_shards import IN_FLIGHT, ReplicaShards, _Slot
from trainsys.telemetry.recorder import Recorder, here

STEPS, MICROS, FP32 = 2, 2, 4
OPTIM = {"shard": {"optim": "over_replicas"}}
BOTH = {"shard": {"optim": "over_replicas", "grads": "over_replicas"}}
ROWS: dict[str, dict[str, Any]] = {"none": {}, "optim": OPTIM, "grads": BOTH}


def _config(parallel: dict[str, Any]) -> RunConfig:
    readers = parallel.get("dp_replicate", 1) * parallel.get("dp_shard", 1)
    return RunConfig(
        # Widths that 2 and 4 divide, so that nothing is padded.
        model=ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, d_ff=64, vocab=64, max_seq_len=64),
        parallel=ParallelConfig(**{"dp_shard": 1, **parallel}),
        data=DataConfig(source="synthetic", prefetch=0),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(
            seq_len=16, global_batch=readers * MICROS, micro_batch=1, dtype="fp32", device="cpu", steps=10
        ),
    )


def _train(cfg: RunConfig) -> dict[str, Any]:
    layout = Layout.resolve(cfg.parallel, dist.get_world_size())
    mesh = Mesh(layout, torch.device("cpu"))
    rank = dist.get_rank()
    info = here(run_id="test", rank=rank, world=layout.world)
    engine = NativeEngine(cfg, mesh, Recorder(None, info, watch_gc=False))
    with Loader(build_source(cfg), layout, rank, 1) as loader:
        for step in range(STEPS):
            engine.train_step(step, next(loader))
    model = engine.model
    assert isinstance(model, ParallelModel)
    state = {t.name: t for t in engine.state()}
    return {
        "sent": {op: t.sent_bytes for (axis, op), t in mesh.ledger.traffic.items() if axis == "dp_replicate"},
        "weights": sum(t.data.numel() for name, t in state.items() if "@" not in name),
        "moments": sum(t.data.numel() for name, t in state.items() if name.endswith("@exp_avg")),
        "whole_gradients": sum(g.numel() for p in model.module.parameters() if (g := local_grad(p)) is not None),
        "gradients": sum(g.data.numel() for g in engine.gradients()),
    }


@pytest.mark.parametrize(
    "parallel", [{"dp_replicate": 2}, {"dp_replicate": 4}, {"dp_replicate": 2, "dp_shard": 2}]
)
def test_each_replica_keeps_its_part_and_sends_what_an_all_reduce_would(parallel: dict[str, int]) -> None:
    replicas, world = parallel["dp_replicate"], math.prod(parallel.values())
    held = run_ranks(world, _train, _config(parallel))[0]["weights"]
    for how, shard in ROWS.items():
        degree = 1 if how == "none" else replicas
        part = held * FP32 * (replicas - 1) // replicas  # what one collective sends of the gradients once
        if how == "none":
            sent = {"all_reduce": STEPS * 2 * part}
        else:
            reductions = STEPS * (MICROS if how == "grads" else 1)
            sent = {"reduce_scatter": reductions * part, "all_gather": STEPS * part}
        for rank in run_ranks(world, _train, _config({**parallel, **shard})):
            assert rank["weights"] == held
            assert rank["moments"] == rank["gradients"] == held / degree
            assert rank["whole_gradients"] == (held if how == "none" else 0)
            assert rank["sent"] == sent


def _gradients_between(each_backward: bool) -> int:
    """Elements of whole gradients that exist after a micro-batch that is not the last."""
    mesh = Mesh(Layout(dp_replicate=2), torch.device("cpu"))
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    shards = ReplicaShards(params, mesh["dp_replicate"], 25.0, each_backward=each_backward)
    shards.sync = False
    (params[0].sum() + params[1].sum()).backward()
    found = sum(p.grad.numel() for p in params if p.grad is not None)
    shards.sync = True
    (params[0].sum() + params[1].sum()).backward()
    shards.wait()
    for bucket in shards.buckets:
        assert bucket.sums is not None
        assert set(bucket.sums.tolist()) <= {0.0, 4.0}  # two micro-batches of two replicas, and padding
    return found


def _messages_after_a_backward() -> tuple[int, int, float]:
    """(messages that exist, buckets, a bucket's sum once all have come), of ten parameters in a bucket each."""
    mesh = Mesh(Layout(dp_replicate=2), torch.device("cpu"))
    params = [nn.Parameter(torch.ones(64)) for _ in range(10)]
    shards = ReplicaShards(params, mesh["dp_replicate"], 1e-5)
    shards.sync = True
    sum(p.sum() for p in params).backward()
    found = sum(bool(bucket.held) for bucket in shards.buckets)
    shards.wait()
    assert not any(bucket.held for bucket in shards.buckets)
    return found, len(shards.buckets), float(sum(b.sums.sum() for b in shards.buckets if b.sums is not None))


def test_few_messages_exist_at_a_time() -> None:
    for found in run_ranks(2, _messages_after_a_backward):
        assert found == (IN_FLIGHT, 10, 10 * 32 * 2.0)


def test_sharded_gradients_are_whole_for_one_micro_batch_only() -> None:
    assert run_ranks(2, _gradients_between, False) == [17, 17]
    assert run_ranks(2, _gradients_between, True) == [0, 0]


def _without_some(each_backward: bool) -> list[float]:
    """A parameter that gets a gradient in the first of two micro-batches only, and one that gets none."""
    mesh = Mesh(Layout(dp_replicate=2), torch.device("cpu"))
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    shards = ReplicaShards(params, mesh["dp_replicate"], 25.0, each_backward=each_backward)
    shards.sync = False
    (params[0].sum() + params[1].sum()).backward()
    shards.sync = True
    params[0].sum().backward()
    shards.wait()
    (bucket,) = shards.buckets
    assert bucket.sums is not None
    return bucket.sums.tolist()


@pytest.mark.parametrize("each_backward", [False, True])
def test_a_gradient_that_does_not_come_counts_as_zero(each_backward: bool) -> None:
    assert run_ranks(2, _without_some, each_backward) == [[0.0, 2.0, 4.0]] * 2


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 5))
def test_pieces_are_disjoint_whole_and_lie_in_one_stretch(shape: list[int], replicas: int) -> None:
    x = torch.arange(float(math.prod(shape))).view(shape)
    slot = _Slot.of(nn.Parameter(x), replicas, 3)
    message = torch.full((replicas, 3 + slot.numel), -1.0)
    for of_x, place in slot.blocks(x, message):
        place.copy_(of_x)
    assert bool((message[:, :3] == -1).all()), "another slot's"
    seen = []
    for replica in range(replicas):
        piece = slot.piece(x, replica)
        assert piece.is_contiguous()
        assert message[replica, 3 : 3 + piece.numel()].tolist() == piece.flatten().tolist()
        assert set(message[replica, 3 + piece.numel() :].tolist()) <= {-1.0}
        seen += piece.flatten().tolist()
    assert sorted(seen) == list(range(x.numel()))
