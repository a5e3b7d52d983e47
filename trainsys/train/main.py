"""One run, from a config to a summary: what every rank executes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.train.process import Process, process
from trainsys.train.report import Reporter


def train(path: str, overrides: Sequence[str] = ()) -> int:
    """Train ``path`` with ``overrides`` on the ranks the environment describes; 0 once all steps are done.

    Raises UserError for what the config, the data or the machine cannot serve.
    """
    cfg = load_run(path, overrides)
    with process(cfg.train) as proc:
        run(cfg, proc)
    return 0


def run(cfg: RunConfig, proc: Process) -> None:
    """Set up and loop. The same global batches and the same loss whatever the layout."""
    started = time.perf_counter(), time.time()
    layout = Layout.resolve(cfg.parallel, proc.world)
    warnings = layout.validate(cfg.model, cfg.train, cfg.parallel)
    source = build_source(cfg)
    mesh = Mesh(layout, proc.device)
    with (
        Reporter(cfg, proc, layout, started, source.describe()) as reporter,
        Loader(source, layout, proc.rank, cfg.train.micro_batch, prefetch=cfg.data.prefetch) as loader,
    ):
        for text in warnings:
            reporter.warn(text)
        mesh.ledger.recorder = reporter.recorder
        engine = NativeEngine(cfg, mesh, reporter.recorder)
        reporter.begin()
        for step in range(cfg.train.steps):
            with reporter.recorder.phase("data"):
                data = next(loader)
            result = engine.train_step(step, data)
            reporter.end_step(step, data, result)
        reporter.done()
