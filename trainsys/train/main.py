"""One run, from a config to a summary: what every rank executes."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainsys.blame import this_node
from trainsys.capabilities import refuse_unable
from trainsys.checkpoint.durable import write_durable
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.failure import COMMAND
from trainsys.launch.proof import DONE_FILE, content
from trainsys.launch.replan import replan
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.resilience.drain import Drain
from trainsys.resilience.lease import Lease
from trainsys.resilience.out_of_memory import out_of_memory
from trainsys.resilience.session import Session, attempt
from trainsys.train.check import check_folders, check_weights, doubts
from trainsys.train.evict import Eviction
from trainsys.train.process import Process, machine_bytes, process
from trainsys.train.report import Reporter


def train(path: str, overrides: Sequence[str] = ()) -> int:
    """Train ``path`` with ``overrides`` on the ranks the environment describes; 0 once all steps are done, or
    once a run that was asked to stop is saved.

    Raises UserError for what the config or the data cannot serve, MachineFault for what the machine cannot.
    """
    cfg = load_run(path, overrides)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.resilience.elastic:
        cfg = replan(cfg, world)
    check_folders(cfg)
    with Drain(cfg.checkpoint_folder, cfg.resilience.grace_s, rank) as drain:
        try:
            with process(cfg.train) as proc, Lease(cfg.checkpoint_folder, proc.ranks, attempt()) as lease:
                step, stopped = run(cfg, proc, drain, lease)
        except Exception as error:
            drain.lost_peer(error)
            if told := out_of_memory(error, cfg, held=drain.has_stepped):
                raise told from error
            raise
    if rank == 0 and step >= cfg.train.steps and (named := os.environ.get(DONE_FILE)):
        write_durable(Path(named), content(step))
    if stopped and drain.interrupted and rank == 0:
        command = os.environ.get(COMMAND) or shlex.join(["trainsys", "train", path, *overrides])
        print(f"trainsys: Ctrl-C: {stopped}; go on with: {command}", file=sys.stderr)
    return drain.exit_code if stopped else 0


def run(cfg: RunConfig, proc: Process, drain: Drain, lease: Lease) -> tuple[int, str]:
    """Set up and loop; the last step that was done, and why it was not ``train.steps`` if it was not. The same global
    batches and the same loss whatever the layout."""
    started = time.perf_counter(), time.time()
    layout = Layout.resolve(cfg.parallel, proc.world)
    refuse_unable(cfg, layout)
    warnings = layout.validate(cfg.model, cfg.train, cfg.parallel, recompute=cfg.recompute)
    source = build_source(cfg)
    session = Session(cfg, source, drain, lease, proc.ranks)
    if session.complete:
        session.say_complete()
        return session.step, ""
    mesh = Mesh(layout, proc.device)
    hosts = proc.ranks.to_first(this_node())
    eviction = Eviction(cfg.launch, hosts, drain)
    with (
        Reporter(
            cfg,
            proc,
            layout,
            started,
            session.data,
            session.first_step,
            session.attempt,
            eviction,
            session.origin,
            hosts,
        ) as reporter,
        session,
        Loader(
            source,
            layout,
            proc.rank,
            cfg.train.micro_batch,
            start_step=session.data_step,
            prefetch=cfg.data.prefetch,
        ) as loader,
    ):
        for text in (*warnings, *doubts(cfg, source)):
            reporter.warn(text)
        mesh.ledger.recorder = reporter.recorder
        check_weights(cfg, layout, proc.local_world, machine_bytes(proc))  # here, so that the run's record has it
        engine = build(cfg, mesh, reporter.recorder)
        session.attach(engine, mesh, reporter)
        reporter.begin()
        while not session.over:
            with reporter.recorder.phase("data"):
                data = next(loader)
            while loader.retried:
                reporter.warn(f"data: {loader.retried.pop(0)}")
            session.guard.labels = data.valid_tokens_global
            result = engine.train_step(session.step, data, session.guard.judge, session.asks)
            reporter.end_step(session.step, data, result)
            session.after(data, result)
        reporter.done(session.stopped)
    return session.step, session.stopped
