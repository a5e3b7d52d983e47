"""Who or what costs everyone time: rank, node, link, collections of garbage, the data's shape, a pipeline stage.

What is compared is work between collectives (``waits.work_between``), among ranks that do the same work. The
statistics, and what keeps false alarms rare, are ``profiler.straggler``'s; this file asks it the questions and
puts the answers in words. The tests of a window share one ``ALPHA`` (Bonferroni).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from trainsys.profiler.links import slow_links
from trainsys.profiler.shape import sequence_imbalance, stage_imbalance
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.straggler import Straggler, find_stragglers
from trainsys.profiler.verdict import ALPHA, LEAST_SHARE, TESTS, Verdict
from trainsys.profiler.waits import work_between, work_phases

WINDOW = 200
"""Steps judged at a time; what lasts over several windows is one verdict."""
MIN_STEPS = 5
MIN_LASTING = 0.25
"""Share of a window's steps, up to its end, in which a rank has to be slow."""
_COMPUTE = ("forward", "backward", "recompute", "optimizer")
_DATA = ("data", "h2d")


def find_blame(table: StepTable) -> list[Verdict]:
    """Verdicts over all judged steps, the costliest first."""
    rows = np.flatnonzero(table.work)
    if rows.size < MIN_STEPS or len(table.ranks) < 2:
        return []
    pieces = np.array_split(rows, max(1, round(rows.size / WINDOW)))
    found: dict[tuple[object, ...], Verdict] = {}
    for i, piece in enumerate(pieces):
        for v in judge_window(table.select(piece), ALPHA / len(pieces)):
            before = found.get(v.key)
            if before is None:
                found[v.key] = v if i == len(pieces) - 1 else replace(v, until=int(table.steps[piece[-1]]))
            else:
                until = None if i == len(pieces) - 1 else int(table.steps[piece[-1]])
                cost = max(before.cost_s, v.cost_s)
                found[v.key] = replace(before, until=until, cost_s=cost, share=max(before.share, v.share))
    return sorted(found.values(), key=lambda v: -v.share)


def judge_window(table: StepTable, alpha: float = ALPHA) -> list[Verdict]:
    """Verdicts over all steps of ``table``, none of which may have a hole."""
    step_s = float(np.median(table.time))
    work = work_between(table)
    peers = table.peers()
    own = alpha / TESTS
    slow = [
        s for s in find_stragglers(work, peers, alpha=own)
        if s.slowdown / (1 + s.slowdown) * float(np.median(work[:, s.index])) >= LEAST_SHARE * step_s
        and len(work) - s.since >= MIN_LASTING * len(work)
    ]  # fmt: skip
    nodes, slow = _nodes(table, work, slow, own, step_s)
    out = nodes + [_rank(table, work, s, step_s) for s in slow]
    out += _garbage(table, step_s)
    out += slow_links(table, work, own, step_s)
    out += stage_imbalance(table, work, own, step_s)
    if not any(v.kind in ("rank", "node") for v in out):
        out += sequence_imbalance(table, work, step_s)
    return out


def _phase_of(table: StepTable, columns: npt.NDArray[np.int64]) -> tuple[str, dict[str, float]]:
    """Which phase the columns are late in, and each phase's slowdown over the other ranks' median."""
    others = np.setdiff1d(np.flatnonzero(np.isin(table.peers(), table.peers()[columns])), columns)
    excess: dict[str, float] = {}
    ratio: dict[str, float] = {}
    for name in work_phases(table):
        values = table.phases[name]
        mine = float(np.median(values[:, columns]))
        rest = float(np.median(values[:, others])) if others.size else mine
        excess[name] = max(0.0, mine - rest)
        ratio[name] = mine / rest - 1 if rest > 0 else 0.0
    total = sum(excess.values())
    if total <= 0:
        return "compute", ratio
    data, compute = (sum(excess.get(n, 0.0) for n in names) for names in (_DATA, _COMPUTE))
    if data > 0.5 * total:
        return "data", ratio
    single = max(excess, key=lambda n: excess[n])
    # One phase alone slow is code or input; all of compute slow alike is the hardware.
    if single in _COMPUTE and excess[single] > 0.85 * total:
        others_of = [n for n in ("forward", "backward") if n != single and n in ratio]
        if all(ratio[n] < 0.25 * ratio[single] for n in others_of):
            return single, ratio
    return ("compute" if compute >= 0.5 * total else single), ratio


_ADVICE = {
    "data": "its loader: workers, storage, a page cache that thrashes; raise data.prefetch; try it on another host",
    "compute": "its clocks, thermals, ECC errors and neighbours; run trainsys bench matmul on it; exclude it and compare",
    "optimizer": "what its optimizer step does that the others' does not: offload, a larger share of parameters",
    "other": "its host: another process on the cores, swapping, logging in the step",
}


def _rank(table: StepTable, work: Floats, s: Straggler, step_s: float) -> Verdict:
    rank = table.ranks[s.index]
    phase, ratio = _phase_of(table, np.array([s.index]))
    where = f" on {table.hosts[rank]}" if table.hosts.get(rank) else ""
    words = {"data": "waits for its data", "compute": "computes slowly"}.get(phase, f"is slow in {phase}")
    gap = s.slowdown / (1 + s.slowdown) * float(np.median(work[:, s.index]))
    cost = s.cost_s if s.cost_s > 0 else gap
    told = ", ".join(f"{n} {100 * r:+.0f}%" for n, r in sorted(ratio.items(), key=lambda kv: -abs(kv[1]))
                     if n in (*_COMPUTE, *_DATA))  # fmt: skip
    return Verdict(
        "rank", f"rank {rank}{where} {words}: {100 * s.slowdown:.0f}% more work time than its peers",
        f"{1e3 * gap:.2f} ms a step above their median, slow in {100 * s.share:.0f}% of the steps, "
        f"z = {min(s.z, 999):.1f}; {told}",
        f"look at {_ADVICE.get(phase, _ADVICE['compute'])}",
        cost, cost / step_s, (rank,), phase, int(table.steps[s.since]),
    )  # fmt: skip


def _nodes(
    table: StepTable, work: Floats, slow: list[Straggler], alpha: float, step_s: float
) -> tuple[list[Verdict], list[Straggler]]:
    """Hosts that are slow as a whole; the stragglers among the ranks that none of them explains."""
    names = sorted({table.hosts.get(rank, "") for rank in table.ranks})
    if len(names) < 3 or "" in names:
        return [], slow
    number = {name: i for i, name in enumerate(names)}
    label = np.array([number[table.hosts[rank]] for rank in table.ranks], np.int64)
    sizes = np.bincount(label)
    if sizes.min() < 2 or sizes.min() != sizes.max():
        return [], slow
    order = np.argsort(label, kind="stable")
    # Stages work differently: each rank relative to its own stage, so that nodes of all stages compare.
    peers = table.peers()
    level = np.ones(work.shape[1])
    for stage in np.unique(peers):
        level[peers == stage] = np.median(work[:, peers == stage])
    # Sorting a few ranks a node is ten times as fast as numpy's median along a short axis.
    ranked = np.sort((work / level)[:, order].reshape(len(work), len(names), -1), axis=2)
    n = ranked.shape[2]
    by_host = (ranked[:, :, (n - 1) // 2] + ranked[:, :, n // 2]) / 2
    out = []
    for s in find_stragglers(by_host, alpha=alpha):
        columns = np.flatnonzero(label == s.index)
        hit = {x.index for x in slow} & set(columns.tolist())
        # One slow rank moves the median of two or three, not that of more.
        if columns.size < 4 and len(hit) < columns.size:
            continue
        ranks = tuple(table.ranks[c] for c in columns)
        phase, _ = _phase_of(table, columns)
        cost = s.slowdown / (1 + s.slowdown) * float(np.median(work[:, columns]))
        out.append(Verdict(
            "node",
            f"node {names[s.index]} is {100 * s.slowdown:.0f}% slower than the others (ranks {ranks[0]}–{ranks[-1]})",
            f"{len(hit)} of its {len(ranks)} ranks are late together; z = {min(s.z, 999):.1f}",
            f"look at {_ADVICE.get(phase, _ADVICE['compute'])}; take the node out and compare",
            cost, cost / step_s, ranks, phase, int(table.steps[s.since]),
        ))  # fmt: skip
        slow = [x for x in slow if x.index not in hit]
    return out, slow


def _garbage(table: StepTable, step_s: float) -> list[Verdict]:
    """Pauses of the collector: the latest rank's excess in each step is what everyone waits."""
    gc = table.phases.get("gc")
    if gc is None:
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
    told = f"rank{'s' * (len(named) > 1)} {', '.join(map(str, named[:8]))}" + (" …" if len(named) > 8 else "")
    return [Verdict(
        "gc", f"garbage collection pauses {told}: {n} pauses of {1e3 * mean:.0f} ms, and all others wait",
        f"in {100 * float(long.any(axis=1).mean()):.0f}% of the steps some rank collects while others do not",
        "gc.freeze() after set-up, and collect on all ranks at the same step; find what makes so many objects",
        cost, cost / step_s, named, "gc", int(table.steps[int(np.flatnonzero(long.any(axis=1))[0])]),
    )]  # fmt: skip
