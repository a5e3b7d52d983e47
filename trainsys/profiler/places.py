"""Nodes and switches that are slow as a whole: then it is no use to replace one of their ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.causes import cause_of
from trainsys.profiler.late_phase import late_phase
from trainsys.profiler.steps import Floats, StepTable
from trainsys.profiler.straggler import Straggler, find_stragglers, row_medians
from trainsys.profiler.verdict import Verdict, ended

Ints = npt.NDArray[np.int64]
LEAST_PLACES = 3
"""With only two, there is no telling which one is normal."""
NEAR = 1.015
"""What half of a place's ranks must be above, so that its median can be 3% above the others': half of that."""


def slow_places(
    table: StepTable, work: Floats, slow: list[Straggler], alpha: float, step_s: float
) -> tuple[list[Verdict], list[Straggler]]:
    """Switches, then nodes, that are slow as a whole, and the stragglers among the ranks that none of them explains."""
    out: list[Verdict] = []
    hosts = [table.hosts.get(rank, "") for rank in table.ranks]
    switches = [table.switches.get(host, "") for host in hosts] if table.switches else []
    for kind, names in (("switch", switches), ("node", hosts)):
        label, found = _numbered(names)
        if len(found) < LEAST_PLACES or "" in found:
            continue
        sizes = np.bincount(label)
        # A switch is more than its nodes' sum only if it has several.
        if kind == "switch" and len(set(hosts)) < 2 * len(found):
            continue
        if sizes.min() < 2 or sizes.min() != sizes.max():
            continue
        verdicts, slow = _slow(kind, table, work, label, found, slow, alpha, step_s)
        named = {rank for v in out for rank in v.ranks}
        out += [v for v in verdicts if not named >= set(v.ranks)]
    return out, slow


def _numbered(names: list[str]) -> tuple[Ints, list[str]]:
    """Each name's number, and the names in the order of their numbers."""
    number: dict[str, int] = {}
    label = np.array([number.setdefault(name, len(number)) for name in names], np.int64)
    return label, list(number)


def _slow(
    kind: str, table: StepTable, work: Floats, label: Ints, names: list[str], slow: list[Straggler], alpha: float,
    step_s: float,
) -> tuple[list[Verdict], list[Straggler]]:  # fmt: skip
    order = np.argsort(label, kind="stable").reshape(len(names), -1)
    even = _in_stage(table, work)
    # At 10,000 ranks nearly all windows end here.
    near = np.count_nonzero(even >= NEAR * row_medians(even)[:, None], axis=0) >= len(even) // 2
    if not (np.count_nonzero(near[order], axis=1) >= order.shape[1] // 2).any():
        return [], slow
    out = []
    for s in find_stragglers(_medians(even[:, order]), alpha=alpha):
        columns = order[s.index]
        hit = {x.index for x in slow} & set(columns.tolist())
        # One slow rank moves the median of two or three, not that of more.
        if columns.size < 4 and len(hit) < columns.size:
            continue
        ranks = tuple(sorted(table.ranks[c] for c in columns))
        when = slice(s.since, s.until)
        phase, _ = late_phase(table.select(np.arange(s.since, s.until)), columns)
        cost = s.slowdown / (1 + s.slowdown) * float(np.median(work[when, columns]))
        cause = cause_of(table, work, columns, phase, s.since, s.until)
        why = f"{cause.why} (the median of its ranks)" if cause.why else ""
        out.append(Verdict(
            kind,
            f"{kind} {names[s.index]} is {100 * s.slowdown:.0f}% slower than the others (ranks {ranks[0]}–{ranks[-1]})",
            f"{len(hit)} of its {len(ranks)} ranks are late together; z = {min(s.z, 999):.1f}{why}",
            f"{cause.look(phase)}; take the {kind} out and compare",
            cost, cost / step_s, ranks, phase, int(table.steps[s.since]), ended(table, s), cause.name,
        ))  # fmt: skip
        slow = [x for x in slow if x.index not in hit]
    return out, slow


def _in_stage(table: StepTable, work: Floats) -> Floats:
    """Work relative to that of the rank's own stage: stages work differently, and nodes of all of them compare."""
    peers = table.peers()
    stages = np.unique(peers)
    if stages.size == 1:
        return work
    level = np.ones(work.shape[1])
    for stage in stages:
        level[peers == stage] = np.median(row_medians(work[:, peers == stage]))
    return np.asarray(work / level)


def _medians(x: Floats) -> Floats:
    """Over the last, short axis: sorting a few ranks a node is ten times as fast as numpy's median."""
    ranked = np.sort(x, axis=2)
    n = ranked.shape[2]
    return np.asarray((ranked[:, :, (n - 1) // 2] + ranked[:, :, n // 2]) / 2)
