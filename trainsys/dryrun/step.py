"""One optimizer step of the native engine under a meter, on this rank, real or fake."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainsys.config.run import RunConfig
from trainsys.data.loader import StepData
from trainsys.data.packing import Batch, Counts
from trainsys.dryrun.meter import Meter
from trainsys.dryrun.parts import mark, told_apart
from trainsys.dryrun.world import as_on_cuda, rank_of, without_memory
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.model import PipelineModel
from trainsys.telemetry.recorder import Recorder


@dataclass(frozen=True)
class RankStep:
    """What one rank does in one optimizer step."""

    rank: int
    coords: dict[str, int]
    flops: dict[str, int]
    """by operation; multiplications only, see :mod:`trainsys.flops`"""
    traffic: dict[str, dict[str, tuple[int, int]]]
    """axis -> operation -> (calls, bytes this rank sends), as the ledger counts them"""
    peak_bytes: int
    memory: dict[str, int]
    """by part at the peak; sums to it"""
    held: dict[str, int]
    """by part between steps"""
    seconds: float
    """that the dry run itself took"""

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def dry_step(cfg: RunConfig, layout: Layout, rank: int, *, as_cuda: bool = False) -> RankStep:
    """The step of ``rank`` without its peers and without memory, in a process that has no process group.

    ``as_cuda``: hold what CUDA would where the code tells devices apart.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = as_on_cuda() if as_cuda else nullcontext()
    with rank_of(layout.world, rank), without_memory(fake), device:
        return metered_step(cfg, layout, rank, fake, streams=as_cuda)


def metered_step(
    cfg: RunConfig,
    layout: Layout,
    rank: int,
    tensors: AbstractContextManager[object] | None = None,
    *,
    streams: bool = False,
    warm_steps: int = 0,
) -> RankStep:
    """Build the engine and take a step under a meter. The process group is up, a real or a fake one.

    ``tensors``: the mode that makes them fake; None: they are real. Moments exist from the start, so that the first
    step holds what later ones hold; ``warm_steps`` before the step are not counted.
    """
    began = time.perf_counter()
    mesh, meter = Mesh(layout, torch.device("cpu")), Meter()
    engine = NativeEngine(cfg, mesh, cast(Recorder, meter))
    if streams:
        _unshard_on_streams(engine)
    with tensors or nullcontext(), meter, told_apart(meter):
        mark(meter, engine.model)
        for tensor in engine.state():
            if "@" in tensor.name:
                meter.belongs(tensor.data, "optimizer")
        data = _step_data(cfg, layout)
        for step in range(warm_steps):
            engine.train_step(step, data)
        mesh.ledger.reset()
        meter.begin()
        engine.train_step(warm_steps, data)
        held = +meter.live
    traffic: dict[str, dict[str, tuple[int, int]]] = {}
    for (axis, op), t in sorted(mesh.ledger.traffic.items()):
        traffic.setdefault(axis, {})[op] = t.calls, t.sent_bytes
    return RankStep(
        rank,
        dict(layout.coords(rank)),
        dict(meter.flops),
        traffic,
        meter.peak,
        dict(+meter.peak_parts),
        dict(held),
        time.perf_counter() - began,
    )


def _unshard_on_streams(engine: NativeEngine) -> None:
    """As on CUDA, where streams overlap what a CPU needs a background thread for."""
    parts = engine.model.parts.values() if isinstance(engine.model, PipelineModel) else [engine.model]
    for part in parts:
        if part.units:
            part.units[0]._set_unshard_async_op(False)


def _step_data(cfg: RunConfig, layout: Layout) -> StepData:
    """A step's micro-batches of this rank: shapes matter, tokens do not."""
    rows, seq = cfg.train.micro_batch, cfg.train.seq_len
    micros = cfg.train.global_batch // (layout.data_world * rows)
    zeros = np.zeros((rows, seq), np.int64)
    positions = np.broadcast_to(np.arange(seq), (rows, seq)).copy()
    docs = positions // (cfg.data.document_length or seq) if cfg.data.document_mask else None
    batch = Batch(zeros, zeros, positions, docs, Counts())
    tokens = cfg.train.global_batch * seq
    return StepData(0, [batch] * micros, tokens, tokens, 0, 0)
