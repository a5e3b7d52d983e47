"""Slow links: a collective takes long although nobody is late to it.

The least blocked member of a group tells how long the group's communication itself took: it came last and waited
for nobody. That time is compared between the groups of an axis, which move the same bytes; and where an axis has
one group only, or few, with what the same group took before.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from trainsys.profiler.causes import HALF, per_step
from trainsys.profiler.steps import Floats, StepTable, axes_of
from trainsys.profiler.straggler import find_stragglers, median_where
from trainsys.profiler.verdict import Verdict, ended
from trainsys.rank_lists import first_few, ranks_named
from trainsys.telemetry.events import COMM

LEAST_SHARE = 0.04
LEAST_RATIO = 2.0
"""A link that takes less than twice the usual time is within what contention does, unless ..."""
LEAST_CHANGE = 1.4
"""... contention can be ruled out: it took less before, while other axes and the ranks' work did not change. For the
only group of its axis, that is: where there are others a slow one of them is better seen beside them."""
MIN_APART = 0.97
"""Then so many pairs of a later and an earlier step have to show it."""
MIN_STEPS_SLOW = 0.8
"""Share of steps in which it must be half again as slow as the usual one."""
MIN_ABOVE = 0.92
"""Share of pairs of a later and an earlier step in which the later one is slower."""
MIN_BEFORE = 8
"""Steps that must show the usual time before a change of it is believed."""


def slow_links(table: StepTable, work: Floats, alpha: float, step_s: float) -> list[Verdict]:
    """At most one verdict: a throttled axis makes groups of others late, so the one with most to save is the cause."""
    own = own_time(table)
    out = []
    for axis, (members, mine) in own.items():
        beside = _beside_others(table, axis, mine, members, alpha, step_s)
        others = [np.median(values, axis=1) for a, (_, values) in own.items() if a != axis]
        slow = beside or _beside_before(table, axis, mine, members, work, others, step_s)
        out += [slow] if slow else []
    return [max(out, key=lambda v: v.cost_s)] if out else []


def own_time(table: StepTable) -> dict[str, tuple[npt.NDArray[np.int64], Floats]]:
    """axis -> (columns of each group's members ``[G, members]``, seconds of communication nobody was late to
    ``[T, G]``)."""
    out = {}
    for axis in axes_of(table):
        found = [g for g in table.groups(axis) if g.shape[1] > 1] if axis not in ("pp", "unknown") else []
        if found:
            members = found[-1]
            out[axis] = members, np.asarray(table.phases[COMM + axis][:, members].min(axis=2))
    return out


def _beside_others(
    table: StepTable, axis: str, own: Floats, members: npt.NDArray[np.int64], alpha: float, step_s: float
) -> Verdict | None:
    if len(members) < 2:
        return None
    peers = table.peers()[members[:, 0]]
    for s in find_stragglers(own + 1e-5, peers, alpha=alpha, min_effect=LEAST_RATIO - 1):
        rest = np.setdiff1d(np.flatnonzero(peers == peers[s.index]), [s.index])
        when = slice(s.since, s.until)
        mine, usual = own[when, s.index], np.median(own[when][:, rest], axis=1)
        cost = float(np.median(mine) - np.median(usual))
        slow = mine > 1.5 * usual
        # A slow link has no quick steps; a busy machine has some.
        floor = _floor(mine) >= LEAST_RATIO * _floor(usual)
        lasting = floor and slow.size >= min(MIN_BEFORE, len(own)) and float(slow.mean()) >= MIN_STEPS_SLOW
        if lasting and cost >= LEAST_SHARE * step_s:
            evidence = (
                f"its communication takes {1e3 * np.median(mine):.2f} ms per step when nobody is late, "
                f"{1e3 * np.median(usual):.2f} ms in the other groups of {axis}; z = {min(s.z, 999):.1f}"
            )
            verdict = _verdict(table, axis, members[s.index], s.slowdown + 1, evidence, cost, step_s, s.since)
            return replace(verdict, until=ended(table, s))
    return None


def _beside_before(
    table: StepTable, axis: str, own: Floats, members: npt.NDArray[np.int64], work: Floats, others: list[Floats],
    step_s: float,
) -> Verdict | None:  # fmt: skip
    """A lasting step upwards of one group's own time, by the best split of the window in two.

    ``others``: the usual time of the other axes, [T] each.
    """
    if len(own) < 2 * MIN_BEFORE:
        return None
    at = _split(own)
    after = np.arange(len(own))[:, None] >= at  # [T, groups]
    low = median_where(own, ~after)
    high = median_where(own, after)
    # A change of it that is worth a closer look, and neither at the very start nor at the very end.
    worth = (high >= LEAST_CHANGE * np.maximum(low, 1e-5)) & (high - low >= LEAST_SHARE * step_s)
    worth &= (at >= MIN_BEFORE) & (len(own) - at >= MIN_BEFORE)
    for g in np.flatnonzero(worth)[np.argsort(-(high - low)[worth])].tolist():
        x, split = own[:, g], int(at[g])
        # Nearly every later step above nearly every earlier one, and not because the machine is busier: then
        # compute is slower too, and so is what the other axes do.
        above = float((x[split:, None] > x[None, :split]).mean())
        growth = min(_floor(x[split:]) / max(_floor(x[:split]), 1e-5), float(high[g] / max(low[g], 1e-5)))
        busier = _growth(np.median(work[:, members[g]], axis=1), split)
        elsewhere = max([1.0, busier, *(_growth(y, split) for y in others)])
        twice = above >= MIN_ABOVE and growth >= LEAST_RATIO * elsewhere
        alone = len(members) == 1 and bool(others) and above >= MIN_APART and growth >= LEAST_CHANGE * elsewhere
        if (twice or alone) and not _its_host(table, members[g], split, float(high[g] - low[g])):
            return _changed(table, axis, members[g], float(low[g]), float(high[g]), step_s, split)
    return None


def _its_host(table: StepTable, columns: npt.NDArray[np.int64], split: int, excess: float) -> bool:
    """Whether a member's process kept its own thread from communicating, by the kernel's counters: other threads that
    hold the interpreter, no CPU, no quota. Half of what the communication takes more, as for a late rank."""
    before, after = per_step(table, 0, split), per_step(table, split, len(table.steps))
    return any(
        bool((after[name][columns] - before[name][columns] >= HALF * excess).any())
        for name in ("others_s", "throttled_s", "wait_s") if name in after
    )  # fmt: skip


def _growth(x: Floats, split: int) -> float:
    """Median from ``split`` on over the median before."""
    return float(np.median(x[split:]) / max(float(np.median(x[:split])), 1e-5))


def _floor(x: Floats) -> float:
    """The time of the quickest fifth of steps."""
    return float(np.quantile(x, 0.2))


def _changed(
    table: StepTable, axis: str, columns: npt.NDArray[np.int64], low: float, high: float, step_s: float, split: int
) -> Verdict:
    evidence = (
        f"its communication takes {1e3 * high:.2f} ms per step when nobody is late, "
        f"{1e3 * low:.2f} ms before step {int(table.steps[split])}; the bytes are the same"
    )
    return _verdict(table, axis, columns, high / max(low, 1e-5), evidence, high - low, step_s, split)


def _split(x: Floats) -> npt.NDArray[np.int64]:
    """[T, G] -> [G]: the place that leaves least squared deviation of log times on both sides."""
    logs = np.log(np.maximum(x, 1e-6))
    n = np.arange(1, len(x))[:, None]
    left, total = np.cumsum(logs, axis=0)[:-1], logs.sum(axis=0)
    explained = left**2 / n + (total - left) ** 2 / (len(x) - n)
    return np.asarray(explained.argmax(axis=0) + 1)


def _verdict(
    table: StepTable, axis: str, columns: npt.NDArray[np.int64], ratio: float, evidence: str, cost: float,
    step_s: float, since: int,
) -> Verdict:  # fmt: skip
    ranks = tuple(table.ranks[c] for c in columns)
    hosts = sorted({table.hosts.get(r, "") for r in ranks} - {""})
    where = f" ({first_few(hosts, 4)})" if len(hosts) > 1 else ""
    return Verdict(
        "link", f"the link of {axis} between {ranks_named(ranks)}{where} is slow: {ratio:.1f} times the usual time",
        evidence,
        "check the cable, switch port and NIC counters between these ranks, and NCCL_DEBUG=INFO for a fallback path",
        cost, cost / step_s, ranks, axis, int(table.steps[since]), cause="link",
    )  # fmt: skip
