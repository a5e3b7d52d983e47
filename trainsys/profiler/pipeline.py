"""A pipeline's typical step, replayed: what each rank did when, and how long the step had been without one's slowness.

The recorder keeps how long each forward and backward of a step took. The schedule says in which order a rank does them
and what each has to wait for. Playing the measured times through that graph gives the step's timeline and, with some of
the times made ideal, what the step would have taken (Lin et al. 2025, as ``profiler.whatif`` does for recorded
operations). Ideal is the mean of all ranks' actions of a kind.

Communication of other axes happens within forward and backward and is timed apart: it is given back to them in
proportion. What a message takes from stage to stage is not known apart from waiting for it, and taken for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.profiler.steps import StepTable
from trainsys.schedules.actions import Action, Schedule
from trainsys.schedules.build import build
from trainsys.schedules.program import Compute, Reduce, programs
from trainsys.schedules.simulate import simulate
from trainsys.telemetry.events import COMM

MAX_ACTIONS = 4000
"""More than that are no picture; the what-ifs do not need it."""


@dataclass(frozen=True)
class PipelineStep:
    """``ranks[i]``: what pipeline rank i did, as (operation, stage, micro-batch, start s, end s): F forward, B backward,
    I and W its halves (gradients of inputs, of weights)."""

    schedule: str
    ranks: list[list[tuple[str, int, int, float, float]]]
    step_s: float
    """Step time of the forwards and backwards, as replayed."""
    measured_s: float
    """The same as it was: step time less data, optimizer and what comes between."""
    bubble: float
    """Share of all ranks' time in which they wait."""
    ideal_s: float
    """Had every rank's actions taken the mean; ``step_s`` where that is no gain (unlike actions can happen to fit)."""
    without: list[float]
    """By pipeline rank: had this one's actions taken the mean of the others'."""


@dataclass(frozen=True)
class _Measured:
    """For ``simulate``: what each action took."""

    seconds: dict[Action, float]
    send: float = 0.0

    def of(self, action: Action) -> float:
        return self.seconds[action]


def pipeline_step(table: StepTable, cfg: RunConfig | None) -> PipelineStep | None:
    """None for a run without a pipeline, or one whose files do not tell its forwards and backwards one by one."""
    layout = table.layout
    if cfg is None or layout.pp < 2 or not table.calls:
        return None
    rows = cfg.train.micro_batch * layout.dp_replicate * layout.dp_shard
    pipe = cfg.parallel.pipeline
    try:
        schedule = build(pipe.schedule, layout.pp, cfg.train.global_batch // rows, pipe.virtual_stages, pipe.unit)
    except UserError:
        return None
    seconds: dict[Action, float] = {}
    for rank in range(layout.pp):
        mine = _of_rank(table, schedule, rank)
        if mine is None:
            return None
        seconds.update(mine)
    usual = _means(seconds, lambda action: True)
    timeline = simulate(schedule, _Measured(seconds))
    alike = simulate(schedule, _Measured({a: usual[a.op] for a in seconds})).step_time
    without = []
    for rank in range(schedule.ranks):
        stages = set(schedule.stages_of(rank))
        others = _means(seconds, lambda action, stages=stages: action.stage not in stages)  # type: ignore[misc]
        faster = {a: min(s, others[a.op]) if a.stage in stages else s for a, s in seconds.items()}
        without.append(simulate(schedule, _Measured(faster)).step_time)
    spans: list[list[tuple[str, int, int, float, float]]] = [
        [(*s.action, round(s.start, 7), round(s.end, 7)) for s in done] for done in timeline.ranks
    ]
    return PipelineStep(
        schedule.name, spans if sum(map(len, spans)) <= MAX_ACTIONS else [], timeline.step_time, _measured(table),
        timeline.bubble, min(alike, timeline.step_time), without,
    )  # fmt: skip


def _means(seconds: dict[Action, float], chosen: Callable[[Action], bool]) -> dict[str, float]:
    """Operation -> mean seconds of the chosen actions."""
    found: dict[str, list[float]] = {}
    for action, s in seconds.items():
        if chosen(action):
            found.setdefault(action.op, []).append(s)
    return {op: float(np.mean(values)) for op, values in found.items()}


def _of_rank(table: StepTable, schedule: Schedule, rank: int) -> dict[Action, float] | None:
    """Median seconds of each action, over steps and over the ranks of this place in the pipeline."""
    peers = [r for r, place in zip(table.ranks, table.peers().tolist(), strict=True) if place == rank]
    found: dict[Action, list[float]] = {}
    for peer in peers:
        calls = table.calls.get(peer)
        if calls is None:
            continue
        left = {name: list(times * _with_communication(table, peer)) for name, times in calls.items()}
        for instruction in programs(schedule)[rank]:
            # The reduction of a stage's gradients is a call of backward too, as short as its start.
            if isinstance(instruction, Reduce) and left.get("backward"):
                left["backward"].pop(0)
            elif isinstance(instruction, Compute):
                of = left.get("forward" if instruction.action.op == "F" else "backward")
                if not of:
                    return None
                found.setdefault(instruction.action, []).append(of.pop(0))
    return {action: float(np.median(values)) for action, values in found.items()} or None


def _with_communication(table: StepTable, rank: int) -> float:
    column = table.ranks.index(rank)
    rows = np.flatnonzero(table.work)

    def mean(name: str) -> float:
        return float(table.phases[name][rows, column].mean())

    compute = sum(mean(name) for name in ("forward", "backward") if name in table.phases)
    apart = sum(mean(name) for name in table.phases if name.startswith(COMM) and name != COMM + "pp")
    return (compute + apart) / compute if compute > 0 else 1.0


def _measured(table: StepTable) -> float:
    rows = np.flatnonzero(table.work)
    inside = [v for n, v in table.phases.items() if n in ("forward", "backward") or n.startswith(COMM)]
    return float(sum(float(v[rows].mean()) for v in inside)) if rows.size else 0.0
