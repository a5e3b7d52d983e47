"""The native engine on one device with its recorder and batches, as every check that takes steps wants it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gpu_checks import Setting
from trainsys.bench.together import Work, repeat
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.data import build_source
from trainsys.data.loader import Loader, StepData
from trainsys.dryrun.swap import swapped
from trainsys.engines.base import StepResult
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel import parallelize
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.events import RunStart
from trainsys.telemetry.recorder import Recorder, here
from trainsys.train.device import CudaTimer

ONE_RANK = ("parallel.dp_replicate=1", "parallel.dp_shard=1", "parallel.tp=1", "train.compile=false")
DEMO = ("optim.warmup_steps=0", "optim.schedule=constant", "train.global_batch=8", "train.micro_batch=4")
"""The demo run, learning from its first step; two micro-batches a step, as accumulation is a path of its own."""
TINY_DEMO = (
    "train.seq_len=32", "train.global_batch=2", "train.micro_batch=1", "model.n_layers=1", "model.d_model=32",
    "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64",
)  # fmt: skip
EXPERTS = "model.moe={n_experts: 8, top_k: 2, d_ff: 64}"


@dataclass
class Bed:
    cfg: RunConfig
    engine: NativeEngine
    recorder: Recorder
    batches: list[StepData]
    steps: int = 0

    def step(self, judge: Callable[[float, float], bool] | None = None) -> StepResult:
        result = self.engine.train_step(self.steps, self.batches[self.steps % len(self.batches)], judge)
        self.recorder.end_step(self.steps)
        self.steps += 1
        return result


def bed(
    at: Setting,
    run: str = "train/demo",
    *overrides: str,
    recorder: type[Recorder] = Recorder,
    batches: int = 1,
) -> Bed:
    """``run`` with ``overrides`` on ``at``'s device, its first ``batches`` global batches made beforehand."""
    demo = (*DEMO, *(TINY_DEMO if at.tiny else ())) if run == "train/demo" else ()
    cfg = load_run(run, [*ONE_RANK, *demo, f"train.device={at.kind}", *overrides])
    mesh = Mesh(Layout.resolve(cfg.parallel, 1), at.device)
    info: RunStart = here(run_id="gpu_day", rank=0, world=1)
    rec = recorder(None, info, timer=CudaTimer() if at.cuda else None, watch_gc=False)
    mesh.ledger.recorder = rec
    engine = NativeEngine(cfg, mesh, rec)
    with Loader(build_source(cfg), mesh.layout, 0, cfg.train.micro_batch, prefetch=0) as loader:
        made = [next(loader) for _ in range(batches)]
    rec.begin()
    return Bed(cfg, engine, rec, made)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Initial weights come from the device's generator: a speed does not depend on which they are, and the CPU needs
    a minute for those of the 2 billion parameters of four layers and an 8B's vocabulary."""

    def draw(model: nn.Module, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0.0, 0.02)
            for buffer in model.buffers():
                buffer.zero_()

    with swapped(parallelize, "init_weights", draw):
        yield


def rate(at: Setting, run: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """``amount`` a second: the median over calls, repeated for ``seconds`` after one that is not counted."""
    run()
    stamps = repeat(Work(run, amount), at.seconds(seconds), at.device)
    return stamps.amount / statistics.median(b - a for a, b in pairwise(stamps.times_s))
