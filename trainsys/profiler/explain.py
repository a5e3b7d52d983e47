"""``trainsys explain``: all that a run's files tell about its time, its ranks and its memory, as one typed tree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainsys.profiler.advice import Advice, advise, to_fit
from trainsys.profiler.blame import Blame
from trainsys.profiler.expected import stage_work
from trainsys.profiler.flops_split import load_config, split_flops
from trainsys.profiler.goodput import Goodput, goodput_of
from trainsys.profiler.loss_curve import LossCurve, loss_curve
from trainsys.profiler.memory import MemoryReport, MemoryUse, memory_report
from trainsys.profiler.peak import at_peak
from trainsys.profiler.pipeline import PipelineStep, pipeline_step
from trainsys.profiler.run_steps import Ints, RunSteps, read_run
from trainsys.profiler.run_timeline import run_timelines
from trainsys.profiler.said_live import SaidLive, said_live
from trainsys.profiler.steps import MEMORY, Floats, StepTable
from trainsys.profiler.straggler import peer_log_ratio
from trainsys.profiler.timeline import Timeline
from trainsys.profiler.verdict import OF_NO_RANK, Verdict
from trainsys.profiler.waits import LateForGood, work_between
from trainsys.profiler.waterfall import JITTER, Ledger, Waterfall, label
from trainsys.profiler.what_if_run import Saved, WhatIf, what_if
from trainsys.rank_lists import rank_numbers, ranks_named
from trainsys.telemetry.run_data import RunData
from trainsys.telemetry.utilization import Utilization, utilization

SCHEMA = "trainsys.explain/1"
BINS = 160
"""Points of a chart over time; longer runs are averaged into so many."""
HEAT_ROWS = 256
CLOCKS_APART_S = 1.0


@dataclass
class OverTime:
    """The waterfall over the run: seconds by term, each bin the mean of ranks and of its steps."""

    steps: list[int]
    terms: dict[str, list[float]]
    labels: dict[str, str]


@dataclass
class HeatMap:
    """Work of a rank over the median of its peers, minus 1, by rank and time."""

    ranks: list[int]
    steps: list[int]
    values: list[list[float]]
    left_out: int = 0


@dataclass
class Explanation:
    """``missing``: what the files lack, which the numbers are worth that much less for."""

    run_id: str
    name: str
    run_dir: str
    status: str
    reason: str
    facts: dict[str, Any]
    use: Utilization
    waterfall: Waterfall | None
    over_time: OverTime | None
    verdicts: list[Verdict]
    said_live: list[SaidLive]
    """What was said of them while it trained."""
    advice: list[Advice]
    goodput: Goodput
    goodput_share: float
    memory: MemoryReport | None
    fit: list[str]
    heat: HeatMap | None
    pipeline: PipelineStep | None
    what_if: list[WhatIf]
    phases: dict[str, list[float]]
    """phase -> mean seconds by rank, in the order of ``ranks``."""
    ranks: list[int]
    step_time: list[tuple[int, float]]
    loss: LossCurve | None = None
    timelines: list[Timeline] = field(default_factory=list)
    """A typical stretch of a few steps, and one about the slowest step if that is another."""
    origin: list[str] = field(default_factory=list)
    """What was said at the start about the checkpoint or the weights that it began with."""
    missing: list[str] = field(default_factory=list)
    schema: str = SCHEMA


def explain(run_dir: str | Path) -> Explanation:
    """Raises UserError where there is no run at all; anything less that is missing is said in the result."""
    return explain_run(*read_run(run_dir))


def explain_run(run: RunData, steps: RunSteps) -> Explanation:
    """The same of what is read already. Its steps are read twice more, a window at a time."""
    cfg = load_config(run.run_dir)
    start = run.start
    steps.stages = stage_work(cfg, steps.layout.pp)
    seen = _Seen(steps)
    for rows, table in steps.windows():
        seen.add(rows, table)
    steps.of_run = replace(steps.of_run, late=seen.late.ranks())
    ledger, over_time = Ledger(start.peak_flops, start.peak_source == "measured"), _OverTime(steps)
    for rows, table in steps.windows():
        over_time.add(rows, table, ledger.add(table, split_flops(table, cfg)))
    fall = ledger.waterfall()
    verdicts = seen.blame.verdicts()
    series = over_time.result(ledger.peak())
    if all(v.kind in OF_NO_RANK for v in verdicts):  # nobody is late for good
        if series is not None and "straggler" in series.labels:
            series.labels["straggler"] = JITTER
        if fall is not None:
            terms = [replace(t, label=JITTER) if t.name == "straggler" else t for t in fall.terms]
            fall = replace(fall, terms=terms)
    use = utilization(run, fall.mfu if fall else None, fall.peak_flops if fall else None)
    memory = memory_report(seen.memory(), start, cfg, run.reason)
    good = goodput_of(run.run_dir, run.lead.rank)
    fit: list[str] = []
    full = 0.0 if memory is None else memory.capacity or 0.0
    if cfg and memory and full and (memory.peak > 0.95 * full or memory.would_have_fitted):
        fit = to_fit(cfg, memory, max(memory.peak - 0.9 * full, 0.02 * full))
    usual = seen.usual()
    pipe = pipeline_step(usual, cfg)
    return Explanation(
        run_id=start.run_id, name=start.name or start.run_id, run_dir=run.run_dir.name, status=run.status,
        reason=run.reason,
        facts={
            "model": start.model, "world": start.world, "layout": {k: v for k, v in start.layout.items() if v > 1},
            "dtype": start.dtype, "hardware": start.hardware or "", "peak_flops": use.peak_flops,
            "peak_label": use.peak_label, "mfu_counts": start.conventions.get("mfu", ""),
            "steps": run.lead.steps, "global_batch": start.global_batch, "seq_len": start.seq_len,
            "parameters": start.parameters, "hosts": len(set(steps.hosts.values()) - {""}),
        },
        use=use, waterfall=fall, over_time=series, verdicts=verdicts,
        said_live=said_live(steps.findings, verdicts),
        advice=advise(fall, cfg, memory, verdicts) if fall is not None else [], goodput=good, goodput_share=good.share,
        memory=memory, fit=fit, heat=seen.heat.result(), pipeline=pipe,
        what_if=[] if fall is None else what_if(fall, pipe, seen.saved.most(steps.ranks)),
        phases={name: values[0].tolist() for name, values in sorted(usual.phases.items()) if usual.work.any()},
        ranks=steps.ranks, step_time=seen.step_time(), origin=start.origin,
        loss=loss_curve(steps, run.lead.rank), timelines=run_timelines(steps, seen.seconds),
        missing=_missing(run, steps, seen.clock_spread_s()),
    )  # fmt: skip


def _thin(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(most, count))}) if count else []


class _Seen:
    """What the first reading of a run's windows tells."""

    def __init__(self, steps: RunSteps) -> None:
        self._steps = steps
        ranks = len(steps.ranks)
        self.late, self.saved, self.heat = LateForGood(), Saved(), _Heat(steps)
        self.blame = Blame(int(steps.work.sum()))
        self._phases: dict[str, Floats] = {}
        self._peaks = np.zeros(ranks)
        self._apart: list[Floats] = []
        self.seconds = np.full(steps.steps.size, math.nan)
        """[T]: the mean rank's time of each step."""

    def add(self, rows: Ints, table: StepTable) -> None:
        self.late.add(table)
        self.saved.add(table)
        self.heat.add(rows, table)
        self.blame.add(table.select(table.work))
        for name, values in table.phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + values[table.work].sum(axis=0)
        self._peaks = np.maximum(self._peaks, table.memory["peak"].max(axis=0))
        if table.apart_s is not None:
            self._apart.append(table.apart_s[self._steps.whole[rows]])
        self.seconds[rows] = np.nanmean(table.time, axis=1)

    def usual(self) -> StepTable:
        """One step: the mean of those that count."""
        count = int(self._steps.work.sum())
        table = self._steps.table(np.zeros(0, np.int64))
        table.work = np.full(1, count > 0)
        table.phases = {name: total[None] / max(1, count) for name, total in self._phases.items() if total.any()}
        return table

    def memory(self) -> MemoryUse:
        steps, column = self._steps, int(self._peaks.argmax()) if self._peaks.size else 0
        fullest = {name: steps.column(steps.ranks[column], "memory", name) for name in MEMORY} if steps.ranks else {}
        stages = steps.table(np.zeros(0, np.int64)).peers()
        return MemoryUse(steps.ranks, stages, self._peaks, steps.steps, fullest)

    def clock_spread_s(self) -> float:
        """How far apart ranks' clocks put the start of a step; ranks end a step together, so they should not."""
        apart = np.concatenate([np.zeros(0), *self._apart])
        return float(np.median(apart)) if apart.size and not np.isnan(apart).any() else 0.0

    def step_time(self) -> list[tuple[int, float]]:
        shown = _thin(self._steps.steps.size, 400)
        return [(int(self._steps.steps[row]), float(self.seconds[row])) for row in shown]


class _Bins:
    """The whole steps of a run in ``BINS`` pieces of equal size: which bin each row is in."""

    def __init__(self, steps: RunSteps) -> None:
        rows = np.flatnonzero(steps.whole) if steps.ranks else np.zeros(0, np.int64)
        pieces = [piece for piece in np.array_split(rows, min(BINS, rows.size) or 1) if piece.size]
        self._begins = np.array([piece[0] for piece in pieces], np.int64)
        self.sizes = np.array([piece.size for piece in pieces], np.int64)
        self.steps = [int(steps.steps[row]) for row in self._begins]

    def of(self, rows: Ints) -> Ints:
        return np.searchsorted(self._begins, rows, side="right") - 1


class _OverTime:
    def __init__(self, steps: RunSteps) -> None:
        self._whole, self._bins = steps.whole, _Bins(steps)
        self._sums: dict[str, Floats] = {}
        self._flops = np.zeros(self._bins.sizes.size)
        """One rank's FLOPs over a bin's steps."""

    def add(self, rows: Ints, table: StepTable, parts: dict[str, Floats]) -> None:
        whole = self._whole[rows]
        at = self._bins.of(rows[whole])
        for name, values in parts.items():
            sums = self._sums.setdefault(name, np.zeros(self._bins.sizes.size))
            np.add.at(sums, at, values[whole].mean(axis=1))
        np.add.at(self._flops, at, table.flops_model[whole] / table.layout.world)

    def result(self, peak: float | None) -> OverTime | None:
        if not self._bins.sizes.size:
            return None
        sums = self._sums if peak is None else at_peak(self._sums, self._flops / peak)
        terms = {name: np.round(values / self._bins.sizes, 7).tolist() for name, values in sums.items()}
        return OverTime(
            self._bins.steps, {name: values for name, values in terms.items() if any(values)},
            {name: label(name) for name in terms},
        )  # fmt: skip


class _Heat:
    """Medians of bins; only the steps of the bin under way are kept."""

    def __init__(self, steps: RunSteps) -> None:
        self._steps, self._bins = steps, _Bins(steps)
        self._open: list[Floats] = []
        self._medians: list[Floats] = []

    def add(self, rows: Ints, table: StepTable) -> None:
        whole = self._steps.whole[rows]
        if not whole.any() or len(table.ranks) < 2:
            return
        ratio = np.expm1(peer_log_ratio(work_between(table)[whole], table.peers()))
        bins = self._bins.of(rows[whole])
        for piece in np.split(ratio, np.flatnonzero(np.diff(bins)) + 1):
            self._open.append(piece)
            if sum(map(len, self._open)) == self._bins.sizes[len(self._medians)]:
                self._medians.append(np.median(np.concatenate(self._open), axis=0))
                self._open = []

    def result(self) -> HeatMap | None:
        if not self._medians:
            return None
        values = np.stack(self._medians, axis=1)  # [R, bins]
        order = np.arange(len(values))
        if order.size > HEAT_ROWS:  # the slowest ones, in the order of rank
            order = np.sort(np.argsort(-np.median(values, axis=1))[:HEAT_ROWS])
        return HeatMap(
            [self._steps.ranks[i] for i in order.tolist()], self._bins.steps,
            [[round(float(v), 4) for v in row] for row in values[order]], len(values) - order.size,
        )  # fmt: skip


def _missing(run: RunData, steps: RunSteps, clock_spread_s: float) -> list[str]:
    out = []
    if run.missing:
        out.append(
            f"{len(run.missing)} of {run.start.world} ranks left no events ({rank_numbers(run.missing)}): "
            "terms are means of the others"
        )
    unended = [rank for rank, r in sorted(run.ranks.items()) if r.end is None]
    if unended and run.status != "done":
        last = max((r.last_step for r in run.ranks.values()), default=-1)
        out.append(
            f"no last record from {ranks_named(unended)} (killed, or running still); the last step on file is {last}"
        )
    out += [str(damage) for damage in run.damages]
    partial = int((~steps.whole).sum())
    if partial:
        out.append(f"{partial} steps are not on file of every rank and are left out of the means")
    if clock_spread_s > CLOCKS_APART_S:
        out.append(
            f"the ranks' clocks are {clock_spread_s:.1f} s apart: steps are matched by number, and only "
            "durations are used"
        )
    if not steps.work.any():
        out.append("no step is on file of every rank: there is nothing to say about where time went")
    return out


def summary_of(e: Explanation) -> dict[str, Any]:
    """Rows for ``summary.json`` and for the tables of sinks."""
    terms = [] if e.waterfall is None else e.waterfall.terms
    return {
        "waterfall": [
            {"term": t.name, "label": t.label, "ms": 1e3 * t.seconds, "share": t.share, "mfu_without": t.mfu_without,
             "estimated": t.estimated, "slowest_rank": t.slowest_rank} for t in terms
        ],
        "verdicts": [
            {"kind": v.kind, "ranks": list(v.ranks), "phase": v.phase, "cause": v.cause, "since": v.since,
             "until": v.until, "ms": 1e3 * v.cost_s, "share": v.share, "title": v.title, "evidence": v.evidence,
             "advice": v.advice} for v in e.verdicts
        ],
        "goodput": e.goodput_share,
    }  # fmt: skip


def to_json(explanation: Explanation) -> bytes:
    """The tree as JSON, keys as in the dataclasses."""
    return msgspec.json.format(msgspec.json.encode(explanation), indent=1)
