"""Layouts that save and layouts that resume, and what the tests of both run on each rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find, load
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

NO_SP = {"sequence_parallel": False}
# name: (world, axes). An odd world too: its shards are uneven and some are empty.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp2": (2, {"dp_replicate": 2}),
    "fsdp2": (2, {"dp_shard": 2}),
    "tp2": (2, {"tp": 2, **NO_SP}),
    "tp2_sp": (2, {"tp": 2}),
    "fsdp3": (3, {"dp_shard": 3}),
    "fsdp4": (4, {"dp_shard": 4}),
    "hsdp2x2": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "ddp2_tp2": (4, {"dp_replicate": 2, "tp": 2, **NO_SP}),
    "fsdp2_tp2_sp": (4, {"dp_shard": 2, "tp": 2}),
    "fsdp2_cp2": (4, {"dp_shard": 2, "cp": 2}),
    "zero1_3": (3, {"dp_replicate": 3, "shard": {"optim": "over_replicas"}}),
    "hsdp2x2_zero2": (
        4,
        {"dp_replicate": 2, "dp_shard": 2, "shard": {"optim": "over_replicas", "grads": "over_replicas"}},
    ),
}
# Two layers of experts, whose place in the choice is balanced by a bias that is no parameter.
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts": (1, {}),
    "experts pp2": (2, {"pp": 2}),
    "experts ep2": (2, {"dp_shard": 2, "ep": 2}),
    "experts fsdp2_tp2": (4, {"dp_shard": 2, "tp": 2}),
    "experts pp2_ep2": (4, {"pp": 2, "dp_shard": 2, "ep": 2}),
}
EXPERTS: dict[str, Any] = {
    "n_layers": 2, "moe": MoEConfig(n_experts=4, top_k=2, d_ff=32, balance="bias"),
}  # fmt: skip
MODEL: dict[str, Any] = {
    "n_layers": 1, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 72, "max_seq_len": 64,
    "qk_norm": True, "init_std": 0.1,
}  # fmt: skip
BEFORE, AFTER = 3, 5
Pieces = list[tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], np.ndarray]]


def config(layout: str, **checkpoint: Any) -> RunConfig:
    axes = {**LAYOUTS, **EXPERT_LAYOUTS}[layout][1]
    readers = axes.get("dp_shard", 1) * axes.get("dp_replicate", 1)
    return RunConfig(
        model=ModelConfig(**{**MODEL, **(EXPERTS if layout in EXPERT_LAYOUTS else {})}),
        parallel=ParallelConfig(**{"dp_shard": 1, **axes}),
        data=DataConfig(source="synthetic", prefetch=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3),
        # One micro-batch a step, whatever the layout: the cheapest step there is.
        train=TrainConfig(
            seq_len=16, global_batch=12, micro_batch=12 // readers, dtype="fp32", device="cpu", steps=20
        ),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def build(cfg: RunConfig) -> NativeEngine:
    ranks = Ranks()
    mesh = Mesh(Layout.resolve(cfg.parallel, ranks.world), torch.device("cpu"))
    info = here(run_id="test", rank=ranks.rank, world=ranks.world)
    return NativeEngine(cfg, mesh, Recorder(None, info, watch_gc=False))


def train(engine: NativeEngine, first: int, steps: int) -> list[float]:
    """Losses of ``steps`` steps from step ``first`` on."""
    cfg, layout = engine.cfg, engine.mesh.layout
    loader = Loader(
        build_source(cfg), layout, engine.mesh.rank, cfg.train.micro_batch, start_step=first, prefetch=0
    )
    return [float(engine.train_step(s, next(loader)).scalars[0]) for s in range(first, first + steps)]


def saver_of(engine: NativeEngine, root: str | Path, **options: Any) -> Saver:
    header = {"layout": {}, "config": engine.cfg.model_dump(mode="json"), "lineage": "test"}
    return Saver(
        engine.cfg.checkpoint, Folder(root), Ranks(), lambda: list(engine.state()), header,
        retry_wait_s=0.01, **options,
    )  # fmt: skip


def pieces(engine: NativeEngine) -> Pieces:
    return [
        (t.name, t.place.full_shape, t.place.bounds, t.data.float().numpy().copy()) for t in engine.state()
    ]


def assemble(by_rank: Iterable[Pieces]) -> dict[str, np.ndarray]:
    """Full tensors; copies must agree to the bit, nothing may be missing."""
    full: dict[str, np.ndarray] = {}
    for held in by_rank:
        for name, shape, bounds, data in held:
            whole = full.setdefault(name, np.full(shape, np.nan, np.float32))
            box = tuple(slice(a, b) for a, b in bounds)
            known = ~np.isnan(whole[box])
            assert np.array_equal(whole[box][known], data[known]), f"{name}: copies differ"
            whole[box] = data
    for name, whole in full.items():
        assert not np.isnan(whole).any(), f"{name}: some elements are nobody's"
    return full


def train_and_save(cfg: RunConfig, root: str) -> tuple[Pieces, list[float]]:
    """A few steps, a save, and the same run's next steps."""
    engine = build(cfg)
    train(engine, 0, BEFORE)
    saver = saver_of(engine, root)
    saver.save(Progress(BEFORE, BEFORE, engine.updates))
    saved = pieces(engine)
    losses = train(engine, BEFORE, AFTER)  # while the save is written behind
    saver.close()
    return saved, losses


def resume_each(cfg: RunConfig, roots: list[str]) -> list[tuple[Pieces, list[float]]]:
    """Load each checkpoint in turn into one engine, so that each load has the one before to overwrite."""
    engine, out = build(cfg), []
    for root in roots:
        found = find(Folder(root), "auto", Ranks())
        assert found is not None
        load(found, engine, Ranks())
        assert engine.updates == BEFORE
        out.append((pieces(engine), train(engine, found.manifest.data_step, AFTER)))
    return out
