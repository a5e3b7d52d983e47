"""Layouts that DeepSpeed runs, and what its tests run on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.parity import Pieces, Trace
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import find, load
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.engines import DeepSpeedConfig
from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import (
    ContextConfig,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    ShardConfig,
    TrainConfig,
)
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.engines.base import Engine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

ULYSSES = ContextConfig(flavour="ulysses")
OVER_REPLICAS = ShardConfig(grads="over_replicas", optim="over_replicas")
NO_SP = {"sequence_parallel": False}
# name: (world, axes, DeepSpeed's settings, other sections, axes that must have communicated)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "one process": (1, {}, {}, {"micro_batch": 4}, ()),
    "one process, ZeRO 2, offload": (1, {}, {"zero_stage": 2, "offload": "optimizer"}, {}, ()),
    "zero0": (2, {"dp_replicate": 2}, {}, {"micro_batch": 3}, ("dp_replicate",)),
    "zero1": (2, {"dp_shard": 2}, {"zero_stage": 1}, {"micro_batch": 3}, ("fsdp",)),
    "zero2": (2, {"dp_shard": 2}, {"zero_stage": 2}, {"micro_batch": 3}, ("fsdp",)),
    "zero3": (2, {"dp_shard": 2}, {}, {"micro_batch": 3}, ("fsdp",)),
    "zero3 tied, recomputed": (2, {"dp_shard": 2}, {}, {"tied": True, "recompute": "full"}, ("fsdp",)),
    "zero2 over replicas": (2, {"dp_replicate": 2, "shard": OVER_REPLICAS}, {}, {}, ("dp_replicate",)),
    "zero1 offload": (2, {"dp_shard": 2}, {"zero_stage": 1, "offload": "optimizer"}, {}, ("fsdp",)),
    "zero3 offload": (2, {"dp_shard": 2}, {"offload": "all"}, {}, ("fsdp",)),
    "zero2 of 3": (3, {"dp_shard": 3}, {"zero_stage": 2}, {"loss_chunk": 5}, ("fsdp",)),
    "zero3 of 3": (3, {"dp_shard": 3}, {}, {}, ("fsdp",)),
    "ulysses": (2, {"cp": 2, "context": ULYSSES}, {}, {}, ("cp",)),
    "ulysses zero2, documents": (
        4, {"cp": 2, "dp_shard": 2, "context": ULYSSES}, {"zero_stage": 2}, {"documents": True}, ("cp", "fsdp"),
    ),
    "tp": (2, {"tp": 2, **NO_SP}, {}, {}, ("tp",)),
    "tp and sp": (2, {"tp": 2}, {}, {"micro_batch": 3}, ("tp",)),
    "tp and sp, zero2": (4, {"tp": 2, "dp_shard": 2}, {"zero_stage": 2}, {}, ("tp", "fsdp")),
    "tp and sp, zero3": (4, {"tp": 2, "dp_shard": 2}, {}, {}, ("tp", "fsdp")),
    "tp and sp, ulysses": (4, {"tp": 2, "cp": 2, "context": ULYSSES}, {}, {}, ("tp", "cp")),
    "tp and sp, ulysses, zero2": (
        4, {"tp": 2, "cp": 2, "context": ULYSSES}, {"zero_stage": 2}, {"documents": True}, ("tp", "cp"),
    ),
    "pp": (2, {"pp": 2}, {}, {"micro_batch": 2}, ("pp",)),
    "pp zero1": (4, {"pp": 2, "dp_shard": 2}, {}, {"micro_batch": 2}, ("pp", "fsdp")),
    "pp tp": (4, {"pp": 2, "tp": 2}, {}, {"micro_batch": 3}, ("pp", "tp")),
    "experts zero2": (2, {"dp_shard": 2}, {"zero_stage": 2}, {"moe": "bias"}, ("fsdp",)),
    "experts zero3": (2, {"dp_shard": 2}, {}, {"moe": "aux_loss"}, ("fsdp",)),
}  # fmt: skip
MODEL: dict[str, Any] = {
    "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 72, "max_seq_len": 64,
    "qk_norm": True, "init_std": 0.1,
}  # fmt: skip
SAVED_AT = 3
AFTER = 2


def config(layout: str, **train: Any) -> RunConfig:
    _, axes, deepspeed, options, _ = LAYOUTS[layout]
    # Two layers where it matters which comes next: to a pipeline, and to stage 3, which gathers ahead.
    layers = 2 if "pp" in axes or "zero3" in layout else 1
    model = dict(MODEL, n_layers=layers, tied_embeddings=options.get("tied", False))
    if balance := options.get("moe"):
        model["moe"] = MoEConfig(n_experts=4, top_k=2, d_ff=32, balance=balance)
    readers = axes.get("dp_shard", 1) * axes.get("dp_replicate", 1)
    return RunConfig(
        engine="deepspeed",
        model=ModelConfig(**model),
        parallel=ParallelConfig(**{"dp_shard": 1, **axes}),
        data=DataConfig(source="synthetic", prefetch=0, document_mask=options.get("documents", False)),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, z_loss=1e-3),
        recompute=RecomputeConfig(policy=options.get("recompute", "none")),
        train=TrainConfig(**{
            "seq_len": 16, "global_batch": 12, "micro_batch": options.get("micro_batch", 12 // readers),
            "loss_chunk": options.get("loss_chunk", 0), "dtype": "fp32", "device": "cpu", "steps": 20, **train,
        }),
        deepspeed=DeepSpeedConfig(**deepspeed),
    )  # fmt: skip


def start(cfg: RunConfig) -> tuple[Engine, Mesh]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mesh = Mesh(Layout.resolve(cfg.parallel, world), torch.device("cpu"))
    return build(cfg, mesh, Recorder(None, here(run_id="test", rank=rank, world=world), watch_gc=False)), mesh


def steps(engine: Any, mesh: Mesh, first: int, count: int, trace: Trace) -> None:
    cfg: RunConfig = engine.cfg
    with Loader(build_source(cfg), mesh.layout, mesh.rank, cfg.train.micro_batch, start_step=first) as loader:
        for step in range(first, first + count):
            if cfg.engine == "deepspeed":
                engine.optimizer.keep_gradients = step == 0
            result = engine.train_step(step, next(loader))
            trace.losses.append(float(result.scalars[0]))
            trace.norms.append(float(result.scalars[1]))
            if step == 0:
                # Only of the first, in a list as long as the losses, which is what `parity.whole` puts together.
                trace.gradients = [pieces(engine.gradients())] + [[] for _ in range(count - 1)]


def pieces(tensors: Any) -> Pieces:
    return [(t.name, t.place.full_shape, t.place.bounds, t.data.float().numpy().copy()) for t in tensors]


def train(cfg: RunConfig, count: int) -> Trace:
    """On each rank: ``count`` steps, with the first one's gradients and the last one's weights."""
    torch.manual_seed(1234 + dist.get_rank())  # must not matter
    engine, mesh = start(cfg)
    trace = Trace()
    built = {key: traffic.calls for key, traffic in mesh.ledger.traffic.items()}
    steps(engine, mesh, 0, count, trace)
    for (axis, op), traffic in mesh.ledger.traffic.items():
        trace.calls[axis] = trace.calls.get(axis, 0) + traffic.calls - built.get((axis, op), 0)
        trace.sent_bytes[axis] = trace.sent_bytes.get(axis, 0) + traffic.sent_bytes
    trace.parameters = pieces(engine.parameters())
    stop(engine)
    return trace


def stop(engine: Any) -> None:
    if hasattr(engine, "close"):
        engine.close()


def save(cfg: RunConfig, root: str) -> tuple[Pieces, list[float]]:
    """A few steps, a checkpoint, and the losses of the steps after it."""
    engine, mesh = start(cfg)
    steps(engine, mesh, 0, SAVED_AT, Trace())
    header = {"layout": {}, "config": cfg.model_dump(mode="json"), "lineage": "test", "engine": cfg.engine}
    saver = Saver(cfg.checkpoint, Folder(root), Ranks(), lambda: list(engine.state()), header)
    saver.save(Progress(SAVED_AT, SAVED_AT, engine.updates))
    saver.close()
    after = Trace()
    held = pieces(engine.state())
    steps(engine, mesh, SAVED_AT, AFTER, after)
    stop(engine)
    return held, after.losses


def resume(cfg: RunConfig, roots: list[str]) -> list[tuple[Pieces, list[float]]]:
    """Each checkpoint in turn into one engine that has trained before: what it holds, and its next losses."""
    engine, mesh = start(cfg)
    out = []
    for root in roots:
        found = find(Folder(Path(root)), "auto", Ranks())
        assert found is not None
        load(found, engine, Ranks())
        assert engine.updates == SAVED_AT
        held, after = pieces(engine.state()), Trace()
        steps(engine, mesh, SAVED_AT, AFTER, after)
        out.append((held, after.losses))
    stop(engine)
    return out
