"""A run's timeline: some typical steps and those about the slowest one, of all ranks on one axis.

Step records say when each step began by the host's clock, and how long each phase took in it, not when. Steps are put
where they were, and phases within a step in a fixed order. Ranks leave a step together, so where hosts' clocks differ
they are set by the ends of steps.
"""

from __future__ import annotations

import numpy as np

from trainsys.profiler.run_steps import Ints, RunSteps
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.straggler import peer_log_ratio
from trainsys.profiler.timeline import MOST_LANES, Lane, Timeline, lanes_shown, track
from trainsys.profiler.waits import work_between
from trainsys.telemetry.events import COMM

SHOWN = 8
"""Steps of a timeline."""
TICK_S = 1e-6
_ORDER = ("data", "h2d", "forward", "recompute", "backward")
_LAST = ("optimizer", "gc", "other")
STALLED = "stall"


def run_timelines(steps: RunSteps, seconds: Floats) -> list[Timeline]:
    """``seconds`` [T]: the mean rank's time of each step, nan where it is unknown. Those steps are read once more."""
    known = np.flatnonzero(steps.work & np.isfinite(seconds))
    if not known.size or not steps.ranks:
        return []
    typical = _typical(known, seconds)
    worst = int(known[np.argmax(seconds[known])])
    out = [_timeline(steps, typical, "typical steps")]
    if worst not in typical and seconds[worst] > 1.2 * float(np.median(seconds[known])):
        about = np.arange(max(0, worst - SHOWN // 2), min(len(steps.steps), worst + SHOWN // 2))
        out.append(_timeline(steps, about[steps.whole[about]], f"about the slowest step, {steps.steps[worst]}"))
    return [t for t in out if t is not None]


def _typical(known: Ints, seconds: Floats) -> Ints:
    """Rows in a row, whose steps are together nearest to as many median ones."""
    n = min(SHOWN, known.size)
    usual = float(np.median(seconds[known]))
    sums = np.convolve(np.abs(seconds[known] - usual), np.ones(n), "valid")
    together = known[n - 1 :] - known[: known.size - n + 1] == n - 1
    at = int(np.argmin(np.where(together, sums, np.inf)))
    return known[at : at + n] if together.any() else known[:1]


def _timeline(steps: RunSteps, rows: Ints, title: str) -> Timeline | None:
    if not rows.size:
        return None
    # Only what follows one another is of one stretch of time.
    rows = rows[: int(np.argmax(np.diff(steps.steps[rows], append=-1) != 1)) + 1]
    table = steps.table(rows)
    begun = table.begun
    if begun is None or not np.isfinite(table.time).all():
        return None
    stalled = sum(table.stalls.values(), start=np.zeros(begun.shape))
    begun, shift = _aligned(table, begun, begun + stalled + table.time)
    work = work_between(table)
    slowness = np.nanmean(peer_log_ratio(work, table.peers()), axis=0) if len(table.ranks) > 1 else np.zeros(1)
    kinds = _kinds(table)
    zero = float(begun[0].min())
    shown = lanes_shown(slowness.tolist())
    lanes = []
    for place, column in enumerate(shown):
        note = "slowest" if place == 0 else "typical" if place == 1 else ""
        lanes.append(Lane(table.ranks[column], note if len(shown) > 2 else "", []))
        lanes[-1].tracks.append(_track(table, column, float(begun[0, column]) - zero, kinds))
    ends = np.median(begun + stalled + table.time, axis=1) - zero
    length = max(sum(lane.tracks[0][i] for i in range(len(lane.tracks[0])) if i % 3 < 2) for lane in lanes)
    out = Timeline(
        f"{title}, {table.steps[0]} to {table.steps[-1]}", TICK_S, length, kinds, ["phases"], lanes,
        [(int(n), round(float(at) / TICK_S)) for n, at in zip(table.steps, ends, strict=True)],
        ["Within a step, phases are in a fixed order: records say how long each took, not when it ran."],
    )  # fmt: skip
    if shift > 1e-4:
        out.notes.append(f"Hosts' clocks are set by the ends of steps, by up to {1e3 * shift:,.1f} ms.")
    if len(table.ranks) > MOST_LANES:
        out.notes.append(f"{len(shown)} of {len(table.ranks)} ranks: half of them the slowest.")
    return out


def _kinds(table: StepTable) -> list[str]:
    """Phases that took any time, in the order in which they are drawn; stalls come before a step."""
    names = [n for n, v in table.phases.items() if v.any()]
    comm = sorted(n for n in names if n.startswith(COMM))
    own = sorted(n for n in names if not n.startswith(COMM) and n not in _ORDER + _LAST)
    stalls = [STALLED] if any(v.any() for v in table.stalls.values()) else []
    return [*stalls, *(n for n in _ORDER if n in names), *own, *comm, *(n for n in _LAST if n in names)]


def _aligned(table: StepTable, begun: Floats, ends: Floats) -> tuple[Floats, float]:
    """When each step began [T, R] with clocks set by its end, and by how much (s) the most was."""
    ahead = np.median(ends - np.median(ends, axis=1, keepdims=True), axis=0)
    hosts = [table.hosts.get(rank, "") for rank in table.ranks]
    for host in set(hosts):
        mine = np.array([h == host for h in hosts])
        # Ranks of a host have one clock: what differs between them is real.
        ahead[mine] = np.median(ahead[mine])
    return begun - ahead, float(np.abs(ahead).max())


def _track(table: StepTable, column: int, first: float, kinds: list[str]) -> list[int]:
    """Phases end to end from where the first step began, ``first`` s after the axis' zero: they and the stalls are all of
    the loop's time."""
    none = np.zeros(len(table.steps))
    stalled = sum((v[:, column] for v in table.stalls.values()), start=none)
    parts = [stalled if k == STALLED else table.phases[k][:, column] for k in kinds]
    lengths = np.maximum(0.0, np.stack(parts, axis=1)).ravel()
    bounds = np.round((first + np.concatenate([np.zeros(1), np.cumsum(lengths)])) / TICK_S).astype(np.int64)
    return track(bounds[:-1], bounds[1:], np.tile(np.arange(len(kinds)), len(table.steps)))
