"""What a run tells about itself while it trains: event files on every rank, the desk and the summary on rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from trainsys.blame import this_node
from trainsys.config.run import RunConfig
from trainsys.data import StepData
from trainsys.engines.base import StepResult
from trainsys.flops import CONVENTIONS, param_counts
from trainsys.layout import Layout
from trainsys.profiler.capture import StepCapture
from trainsys.profiler.expected import stage_work
from trainsys.profiler.explain import explain_run, summary_of
from trainsys.profiler.flops_split import recomputed_share
from trainsys.profiler.run_steps import read_run
from trainsys.profiler.terminal import print_explanation
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.aggregate import Floats
from trainsys.telemetry.attempts import Origin
from trainsys.telemetry.events import Finding, RunStart, Step
from trainsys.telemetry.flops_meter import FlopsMeter
from trainsys.telemetry.recorder import Recorder
from trainsys.telemetry.report import final_report, summarize
from trainsys.telemetry.run_dir import (
    create_run_dir,
    versions,
    write_config,
    write_environment,
    write_summary,
)
from trainsys.telemetry.sinks.base import RunInfo
from trainsys.telemetry.sinks.build import refuse_missing
from trainsys.telemetry.text import rate
from trainsys.telemetry.topology import switch_of
from trainsys.telemetry.utilization import Utilization
from trainsys.train.desk_link import Brief, DeskLink
from trainsys.train.device import CudaTimer, cuda_memory
from trainsys.train.gather import WindowGather
from trainsys.train.peak import find_device, find_peak, raise_peak
from trainsys.train.process import Process


class Reporter:
    """Owns the run's folder, recorder and desk. Enter it before the engine is built.

    ``started``: (monotonic, wall) clocks at the start of the process's work, so that set-up is accounted for.
    ``first_step``: where a resumed run goes on; ``attempt``: how often the job was started before.
    ``data``: what the source says of itself, for the run's record. ``blame``: told of each live verdict,
    ``hosts``: each rank's node (rank 0).
    ``origin``: what the attempt begins with.
    """

    def __init__(
        self,
        cfg: RunConfig,
        proc: Process,
        layout: Layout,
        started: tuple[float, float],
        data: Mapping[str, Any],
        first_step: int = 0,
        attempt: int = 0,
        blame: Callable[[Verdict], None] = lambda verdict: None,
        origin: Origin | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        origin = origin or Origin()
        if proc.rank == 0:
            refuse_missing(cfg.telemetry)
        self.cfg, self.proc, self.layout = cfg, proc, layout
        self.run_dir = Path(
            proc.ranks.from_first(str(create_run_dir(cfg.telemetry.out, cfg.name)) if proc.rank == 0 else "")
        )
        device = find_device(cfg, proc)
        peak = find_peak(cfg, proc, device)
        on_cuda = proc.device.type == "cuda"
        self.info = RunStart(
            run_id=self.run_dir.name,
            rank=proc.rank,
            world=proc.world,
            t0_mono=started[0],
            t0_wall=started[1],
            name=cfg.name,
            hostname=this_node(),
            switch=switch_of(os.environ),
            pid=os.getpid(),
            local_rank=proc.local_rank,
            engine=cfg.engine,
            layout={a: getattr(layout, a) for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")},
            coords=dict(layout.coords(proc.rank)),
            model=cfg.model.name,
            parameters=param_counts(cfg.model).total,
            dtype=cfg.train.dtype,
            steps=cfg.train.steps,
            first_step=first_step,
            attempt=attempt,
            origin=list(origin.lines),
            seq_len=cfg.train.seq_len,
            global_batch=cfg.train.global_batch,
            micro_batch=cfg.train.micro_batch,
            versions=versions(),
            hardware=device.name if device else None,
            device_memory=torch.cuda.get_device_properties(proc.device).total_memory if on_cuda else None,
            peak_flops=peak.flops_per_s if peak else None,
            peak_label=peak.label if peak else "",
            peak_source=peak.source if peak else "",
            conventions=CONVENTIONS,
        )
        self.recorder = Recorder(
            self.run_dir,
            self.info,
            timer=CudaTimer() if on_cuda else None,
            memory=cuda_memory if on_cuda else None,
        )
        self._gather = WindowGather(proc.ranks)
        self._shown: tuple[Step, int] | None = None
        """The last step of the window that is under way between ranks, and the tokens seen until then."""
        self._tokens_seen = 0
        self._doubted = False
        self._capture = StepCapture(self.recorder, self.run_dir, cfg.telemetry.capture_every)
        self._flops = FlopsMeter(cfg.model, cfg.train.seq_len, cfg.recompute)
        self._desk: DeskLink | None = None
        if proc.rank == 0:
            write_config(self.run_dir, cfg)
            facts = origin.facts(attempt, first_step, cfg.train.steps)
            write_environment(self.run_dir, {"data": dict(data), "run": facts})
            shown = RunInfo(
                name=cfg.name,
                run_id=self.info.run_id,
                lineage=origin.lineage or self.info.run_id,
                run_dir=self.run_dir,
                steps=cfg.train.steps,
                first_step=first_step,
                world=proc.world,
                layout=layout.describe(cfg.parallel),
                model=cfg.model.name,
                hardware=self.info.hardware or "",
                peak_label=self.info.peak_label,
                config=cfg.model_dump(mode="json"),
                pid=self.info.pid,
            )
            replicas = proc.world // layout.data_world
            brief = Brief(
                cfg.telemetry, shown, layout, replicas, self.info.peak_flops, recomputed_share(cfg),
                self.info.peak_source == "measured", tuple(hosts), stage_work(cfg, layout.pp),
            )  # fmt: skip
            self._desk = DeskLink(brief, self.recorder.message, partial(self._found, blame))

    def _found(self, blame: Callable[[Verdict], None], verdict: Verdict, finding: Finding) -> None:
        """News of the desk's: for the record, and for who acts on it."""
        self.recorder.put(finding)
        blame(verdict)

    def warn(self, text: str) -> None:
        """A line for the user and the record; from any thread, shown once (rank 0)."""
        self._tell("warning", text)

    def say(self, text: str) -> None:
        """The same, where nothing is wrong."""
        self._tell("info", text)

    def _tell(self, level: Literal["info", "warning"], text: str) -> None:
        self.recorder.message(level, text)
        if self._desk is not None:
            self._desk.message(level, text)

    def begin(self) -> None:
        """The loop starts now."""
        self.recorder.begin()
        self._capture.before(self.info.first_step)

    def end_step(self, step: int, data: StepData, result: StepResult) -> None:
        """Close the step's record; every ``log_every`` steps show the window of all ranks."""
        loss, norm = result.scalars.tolist()
        real, padded, pairs = data.real_tokens_global, data.padded_tokens_global, data.attn_pairs_global
        flops = self._flops(real, pairs, real + padded)
        tokens = tokens_padded = attn_pairs = 0
        for batch in data.micro_batches:
            counts = batch.counts
            tokens += counts.real_tokens
            tokens_padded += counts.padded_tokens
            attn_pairs += counts.attn_pairs
        record = self.recorder.end_step(
            step,
            tokens=tokens,
            tokens_padded=tokens_padded,
            attn_pairs=attn_pairs,
            loss=loss,
            grad_norm=norm,
            lr=result.lr,
            flops=flops,
        )
        captured = self._capture.after(record)
        if captured is not None and self._desk is not None:
            self._desk.call("refine", captured)
        self._tokens_seen += real
        self._gather.add(record)
        if (record.mfu or 0.0) > 1.0 and not self._doubted:
            self._doubted = True
            self.warn(
                f"step {step} has an mfu above 100% of the peak ({self.info.peak_label}): the report at the end says "
                "whether the peak is too low"
            )
        last = step == self.cfg.train.steps - 1
        if (step + 1) % self.cfg.telemetry.log_every == 0 or last:
            self._show(self._gather.exchange())
            self._shown = record, self._tokens_seen
        if last:
            self._show(self._gather.last())
        else:
            self._capture.before(step + 1)

    def _show(self, window: Floats | None) -> None:
        """Rank 0's last shown step, with what all ranks saw since the one before, goes to the desk."""
        if self._desk is not None and window is not None and self._shown is not None:
            self._desk.call("window", window, *self._shown)

    def done(self, stopped: str = "") -> None:
        """The loop is over, before its last step if ``stopped`` says why: end the files, print what they say."""
        if stopped:
            self.warn(stopped)
        self._finish("stopped" if stopped else "done", stopped)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._finish("stopped" if stopped else "failed", reason, wait=False)

    def _finish(
        self, status: Literal["done", "stopped", "failed"], reason: str = "", wait: bool = True
    ) -> None:
        self.recorder.finish(status, reason)
        if wait:
            self._gather.last()
        self._gather.close()
        if wait:
            self.proc.ranks.barrier()  # every rank's file is whole before rank 0 reads them
        if self._desk is None:
            return
        self._desk.settle(timeout_s=30.0 if wait else 5.0)
        data, steps = read_run(self.run_dir)
        told = explain_run(data, steps)
        summary = {**summarize(data, told.use), **summary_of(told)}
        write_summary(self.run_dir, summary)
        self._settle_peak(told.use)
        self._desk.finish(summary, timeout_s=25.0 if wait else 5.0)
        if wait:
            final_report(data, told.use)
            print_explanation(told)

    def _settle_peak(self, use: Utilization) -> None:
        """The last word on the peak, where a step or the run was faster; a measured one is kept for later runs."""
        assert self._desk is not None
        if use.peak_note and use.peak_flops:
            kept = self.info.peak_source == "measured" and raise_peak(
                self.cfg.train.dtype, self.proc, use.peak_flops * self.info.world
            )
            self._desk.message(
                "warning", f"peak: {rate(use.peak_flops)} {use.peak_note}; mfu is of it in report, summary and sinks"
                + ", and the next run starts with it" * kept
            )  # fmt: skip
        elif self._doubted and use.mfu is not None:
            self._desk.message(
                "info",
                f"withdrawn: the warning of an mfu above 100%; over the run it is {100 * use.mfu:.1f}%: the peak stands",
            )
