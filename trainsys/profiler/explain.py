"""``trainsys explain``: all that a run's files tell about its time, its ranks and its memory, as one typed tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainsys.layout.many import rank_numbers, ranks_named
from trainsys.profiler.advice import Advice, advise, to_fit
from trainsys.profiler.blame import find_blame
from trainsys.profiler.flops_split import load_config, split_flops
from trainsys.profiler.goodput import Goodput, goodput_of
from trainsys.profiler.memory import MemoryReport, memory_report
from trainsys.profiler.pipeline import PipelineStep, pipeline_step
from trainsys.profiler.steps import Floats, StepTable, load_steps
from trainsys.profiler.straggler import peer_log_ratio
from trainsys.profiler.verdict import Verdict
from trainsys.profiler.waits import work_between
from trainsys.profiler.waterfall import Waterfall, label, mean_capture, seconds_by_term, waterfall
from trainsys.profiler.what_if_run import WhatIf, what_if
from trainsys.telemetry.run_data import RunData
from trainsys.telemetry.run_data import load_run as load_events

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
    waterfall: Waterfall | None
    over_time: OverTime | None
    verdicts: list[Verdict]
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
    loss: list[tuple[int, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    schema: str = SCHEMA


def explain(run_dir: str | Path) -> Explanation:
    """Raises UserError where there is no run at all; anything less that is missing is said in the result."""
    run_dir = Path(run_dir)
    run = load_events(run_dir)
    table = load_steps(run_dir, run.start, run.ranks)
    return explain_table(run, table)


def explain_table(run: RunData, table: StepTable) -> Explanation:
    """The same of what is loaded already."""
    cfg = load_config(run.run_dir)
    work = split_flops(table, cfg)
    fall = waterfall(table, run.start.peak_flops, work)
    memory = memory_report(table, run.start, cfg, run.reason)
    verdicts = find_blame(table)
    good = goodput_of(run.run_dir, run.lead.rank)
    fit: list[str] = []
    full = 0.0 if memory is None else memory.capacity or 0.0
    if cfg and memory and full and (memory.peak > 0.95 * full or memory.would_have_fitted):
        fit = to_fit(cfg, memory, max(memory.peak - 0.9 * full, 0.02 * full))
    start = run.start
    rows = np.flatnonzero(table.work)
    pipe = pipeline_step(table, cfg)
    return Explanation(
        run_id=start.run_id, name=start.name or start.run_id, run_dir=run.run_dir.name, status=run.status,
        reason=run.reason,
        facts={
            "model": start.model, "world": start.world, "layout": {k: v for k, v in start.layout.items() if v > 1},
            "dtype": start.dtype, "hardware": start.hardware or "", "peak_flops": start.peak_flops,
            "peak_label": start.peak_label, "mfu_counts": start.conventions.get("mfu", ""),
            "steps": run.lead.steps, "global_batch": start.global_batch, "seq_len": start.seq_len,
            "parameters": start.parameters, "hosts": len(set(table.hosts.values()) - {""}),
        },
        waterfall=fall, over_time=_over_time(table, run, work), verdicts=verdicts,
        advice=advise(fall, cfg, memory) if fall is not None else [], goodput=good, goodput_share=good.share,
        memory=memory, fit=fit, heat=_heat(table), pipeline=pipe,
        what_if=[] if fall is None else what_if(table, fall, pipe),
        phases={name: values[rows].mean(axis=0).tolist() for name, values in sorted(table.phases.items())}
        if rows.size else {},
        ranks=table.ranks,
        step_time=[(int(table.steps[i]), float(np.nanmean(table.time[i]))) for i in _thin(len(table.steps), 400)],
        missing=_missing(run, table),
    )  # fmt: skip


def _thin(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(most, count))}) if count else []


def _bins(count: int) -> list[Sequence[int]]:
    return [piece.tolist() for piece in np.array_split(np.arange(count), min(BINS, count))]


def _over_time(table: StepTable, run: RunData, work: Any) -> OverTime | None:
    rows = np.flatnonzero(np.isfinite(table.time).all(axis=1)) if table.ranks else np.zeros(0, np.int64)
    if not rows.size:
        return None
    parts = seconds_by_term(table, run.start.peak_flops, work, mean_capture(table.captures))
    pieces = _bins(rows.size)

    def mean(values: Floats) -> list[float]:
        by_step = values[rows].mean(axis=1)
        return [round(float(by_step[piece].mean()), 7) for piece in pieces]

    terms = {name: mean(values) for name, values in parts.items()}
    return OverTime(
        [int(table.steps[rows[piece[0]]]) for piece in pieces],
        {name: values for name, values in terms.items() if any(values)},
        {name: label(name) for name in terms},
    )


def _heat(table: StepTable) -> HeatMap | None:
    rows = np.flatnonzero(np.isfinite(table.time).all(axis=1)) if table.ranks else np.zeros(0, np.int64)
    if not rows.size or len(table.ranks) < 2:
        return None
    ratio = np.expm1(peer_log_ratio(work_between(table)[rows], table.peers()))
    order = np.arange(len(table.ranks))
    if order.size > HEAT_ROWS:  # the slowest ones, in the order of rank
        order = np.sort(np.argsort(-np.median(ratio, axis=0))[:HEAT_ROWS])
    pieces = _bins(rows.size)
    values = np.stack([np.median(ratio[piece], axis=0) for piece in pieces], axis=1)[order]
    return HeatMap(
        [table.ranks[i] for i in order.tolist()],
        [int(table.steps[rows[piece[0]]]) for piece in pieces],
        [[round(float(v), 4) for v in row] for row in values],
        len(table.ranks) - order.size,
    )


def _missing(run: RunData, table: StepTable) -> list[str]:
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
    partial = int((~np.isfinite(table.time)).any(axis=1).sum()) if table.ranks else 0
    if partial:
        out.append(f"{partial} steps are not on file of every rank and are left out of the means")
    if table.clock_spread_s > CLOCKS_APART_S:
        out.append(
            f"the ranks' clocks are {table.clock_spread_s:.1f} s apart: steps are matched by number, and only "
            "durations are used"
        )
    if not table.work.any():
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
            {"kind": v.kind, "ranks": list(v.ranks), "phase": v.phase, "since": v.since, "ms": 1e3 * v.cost_s,
             "share": v.share, "title": v.title, "evidence": v.evidence, "advice": v.advice} for v in e.verdicts
        ],
        "goodput": e.goodput_share,
    }  # fmt: skip


def to_json(explanation: Explanation) -> bytes:
    """The tree as JSON, keys as in the dataclasses."""
    return msgspec.json.format(msgspec.json.encode(explanation), indent=1)
