"""Who or what holds all ranks up: rank, node, switch, link, garbage collection, the data's shape, a pipeline stage.

What is compared is work between collectives (``waits.work_between``), among ranks that do the same work. The
statistics, and what keeps false alarms rare, are ``profiler.straggler``'s; this file asks it the questions and
puts the answers in words. The tests of a window share one ``ALPHA`` (Bonferroni).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainsys.profiler.causes import cause_of
from trainsys.profiler.late_phase import COMPUTE, DATA, late_phase
from trainsys.profiler.links import slow_links
from trainsys.profiler.places import slow_places
from trainsys.profiler.shape import sequence_imbalance, stage_imbalance
from trainsys.profiler.slowdown import Slowdown
from trainsys.profiler.steps import Floats, StepTable, window_count
from trainsys.profiler.straggler import LEAST_STEPS, Straggler, find_stragglers, row_medians
from trainsys.profiler.verdict import ALPHA, LEAST_SHARE, TESTS, Verdict, ended
from trainsys.profiler.waits import work_between
from trainsys.rank_lists import ranks_named

MIN_STEPS = 5


def find_blame(table: StepTable) -> list[Verdict]:
    """Verdicts over all judged steps, the costliest first."""
    rows = np.flatnonzero(table.work)
    pieces = np.array_split(rows, window_count(rows.size))
    blame = Blame(rows.size)
    for piece in pieces:
        blame.add(table.select(piece))
    return blame.verdicts()


class Blame:
    """Verdicts over windows of about ``WINDOW`` judged steps, in order; ``steps``: how many there will be in all."""

    def __init__(self, steps: int) -> None:
        self._left = steps if steps >= MIN_STEPS else 0
        self._alpha = ALPHA / window_count(steps)
        self._found: dict[tuple[object, ...], list[Verdict]] = {}
        """Episodes of each finding, in order."""
        self._slowdown = Slowdown()
        self._end: int | None = None
        """The last step of the window before."""

    def add(self, table: StepTable) -> None:
        """``table``: judged steps alone."""
        if not len(table.steps) or not self._left:
            return
        work = work_between(table)
        self._slowdown.add(table, work)
        if len(table.ranks) < 2:
            return
        self._left -= len(table.steps)
        # What still is so at the run's end has no end.
        until = int(table.steps[-1]) if self._left > 0 else None
        for v in _judge(table, work, self._alpha):
            v = v if v.until is not None else replace(v, until=until)
            episodes = self._found.setdefault(v.key, [])
            before = episodes[-1] if episodes else None
            at = int(np.searchsorted(table.steps, v.since))
            if before is not None and before.until == self._end and at < LEAST_STEPS:
                cost, share = max(before.cost_s, v.cost_s), max(before.share, v.share)
                episodes[-1] = replace(before, until=v.until, cost_s=cost, share=share)
            else:
                episodes.append(v)
        self._end = int(table.steps[-1])

    def verdicts(self) -> list[Verdict]:
        """The costliest first."""
        found = [v for episodes in self._found.values() for v in episodes]
        return sorted(found + self._slowdown.verdicts(), key=lambda v: -v.share)


def judge_window(table: StepTable, alpha: float = ALPHA) -> list[Verdict]:
    """Verdicts over all steps of ``table``, none of which may have a hole."""
    return _judge(table, work_between(table), alpha)


def _judge(table: StepTable, work: Floats, alpha: float) -> list[Verdict]:
    step_s = float(np.median(row_medians(table.time)))
    peers = table.peers()
    own = alpha / TESTS
    slow = [
        s for s in find_stragglers(work, peers, alpha=own)
        if (s.cost_s if s.now_and_then else _gap(work, s)) >= LEAST_SHARE * step_s
    ]  # fmt: skip
    places, slow = slow_places(table, work, slow, own, step_s)
    out = places + [_rank(table, work, s, step_s) for s in slow]
    out += _garbage(table, step_s)
    out += slow_links(table, work, own, step_s)
    out += stage_imbalance(table, work, own, step_s)
    if not any(v.kind in ("rank", "node", "switch") or (v.kind == "stage" and v.ranks) for v in out):
        out += sequence_imbalance(table, work, step_s)
    return out


def _gap(work: Floats, s: Straggler) -> float:
    """Seconds above the peers' median in a step in which it was slow."""
    return s.slowdown / (1 + s.slowdown) * float(np.median(work[s.since : s.until, s.index]))


def _rank(table: StepTable, work: Floats, s: Straggler, step_s: float) -> Verdict:
    rank = table.ranks[s.index]
    rows = np.arange(s.since, s.until)
    if s.now_and_then:
        rows = rows[np.argsort(-work[rows, s.index])[: max(1, round(s.share * len(work)))]]
    phase, ratio = late_phase(table.select(np.sort(rows)), np.array([s.index]))
    where = f" on {table.hosts[rank]}" if table.hosts.get(rank) else ""
    cause = cause_of(table, work, np.array([s.index]), phase, s.since, s.until)
    late = {"data": "waits for its data", "compute": "computes slowly"}.get(phase, f"is slow in {phase}")
    words = cause.words or late
    gap = _gap(work, s)
    cost = s.cost_s if s.cost_s > 0 else gap
    how = f"{100 * s.slowdown:.0f}% more work time than its peers"
    told_when = f"{1e3 * gap:.2f} ms per step above their median, slow in {100 * s.share:.0f}% of the steps"
    if s.now_and_then:
        words += " now and then"
        how = f"in {100 * s.share:.0f}% of the steps, by {100 * s.slowdown:.0f}%"
        told_when = "all over the window, in which no other rank is late so often"
    told = ", ".join(f"{n} {100 * r:+.0f}%" for n, r in sorted(ratio.items(), key=lambda kv: -abs(kv[1]))
                     if n in (*COMPUTE, *DATA))  # fmt: skip
    return Verdict(
        "rank", f"rank {rank}{where} {words}: {how}", f"{told_when}, z = {min(s.z, 999):.1f}; {told}{cause.why}",
        cause.look(phase),
        cost, cost / step_s, (rank,), phase, int(table.steps[s.since]), ended(table, s), cause.name,
    )  # fmt: skip


def _garbage(table: StepTable, step_s: float) -> list[Verdict]:
    """Pauses of the collector: the latest rank's excess in each step is what everyone waits."""
    gc = table.phases.get("gc")
    # What everyone waits is no more than the longest pauses.
    if gc is None or float(gc.max(axis=1).mean()) < 0.01 * step_s:
        return []
    excess = gc - np.median(gc, axis=1, keepdims=True)
    if len(table.ranks) == 2:
        excess = gc - gc.min(axis=1, keepdims=True)
    cost = float(excess.max(axis=1).mean())
    long = excess > max(0.003, 0.02 * step_s)
    if cost < 0.01 * step_s or long.any(axis=1).sum() < 2:
        return []
    who = np.flatnonzero(long.sum(axis=0))
    total = excess[:, who].sum(axis=0)
    # Whose pauses are a sizeable part of it; the rest is what any program has.
    named = tuple(table.ranks[c] for c in who[total >= 0.25 * total.max()])
    n, mean = int(long.sum()), float(gc[long].mean())
    told = ranks_named(named)
    return [Verdict(
        "gc", f"garbage collection pauses {told}: {n} pauses of {1e3 * mean:.0f} ms, and all others wait",
        f"in {100 * float(long.any(axis=1).mean()):.0f}% of the steps some rank collects while others do not",
        "gc.freeze() after set-up, and collect on all ranks at the same step; find what makes so many objects",
        cost, cost / step_s, named, "gc", int(table.steps[int(np.flatnonzero(long.any(axis=1))[0])]), cause="gc",
    )]  # fmt: skip
