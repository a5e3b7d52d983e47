"""Slow links: a collective takes long although nobody is late to it.

The least blocked member of a group tells how long the group's communication itself took: it came last and waited
for nobody. That time is compared between the groups of an axis, which move the same bytes; and where an axis has
one group only, or few, with what the same group took before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.steps import Floats, StepTable, axes_of
from trainsys.profiler.straggler import find_stragglers
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.events import COMM

LEAST_SHARE = 0.03
LEAST_RATIO = 1.5
"""A link that is less than half again as slow is within what contention does."""
MIN_BEFORE = 8
"""Steps that must show the usual time before a change of it is believed."""


def slow_links(table: StepTable, alpha: float, step_s: float) -> list[Verdict]:
    """At most one verdict an axis."""
    out = []
    for axis in axes_of(table):
        if axis in ("pp", "unknown"):
            continue
        groups = [g for g in table.groups(axis) if g.shape[1] > 1]
        if not groups:
            continue
        members = groups[-1]
        own = table.phases[COMM + axis][:, members].min(axis=2)  # [T, groups]
        found = _beside_others(table, axis, own, members, alpha, step_s)
        found = found or _beside_before(table, axis, own, members, step_s)
        out += [found] if found else []
    # The throttled axis makes groups of others late at most; the one with most to save is the cause.
    return [max(out, key=lambda v: v.cost_s)] if out else []


def _beside_others(
    table: StepTable, axis: str, own: Floats, members: npt.NDArray[np.int64], alpha: float, step_s: float
) -> Verdict | None:
    if len(members) < 2:
        return None
    peers = table.peers()[members[:, 0]]
    for s in find_stragglers(own + 1e-5, peers, alpha=alpha, min_effect=LEAST_RATIO - 1):
        rest = np.setdiff1d(np.flatnonzero(peers == peers[s.index]), [s.index])
        cost = float(np.median(own[:, s.index]) - np.median(own[:, rest]))
        if cost >= LEAST_SHARE * step_s:
            evidence = (
                f"its communication takes {1e3 * np.median(own[:, s.index]):.2f} ms a step when nobody is late, "
                f"{1e3 * np.median(own[:, rest]):.2f} ms in the other groups of {axis}; z = {min(s.z, 999):.1f}"
            )
            return _verdict(table, axis, members[s.index], s.slowdown + 1, evidence, cost, step_s, s.since)
    return None


def _beside_before(
    table: StepTable, axis: str, own: Floats, members: npt.NDArray[np.int64], step_s: float
) -> Verdict | None:
    """A lasting step upwards of one group's own time, by the best split of the window in two."""
    if len(own) < 2 * MIN_BEFORE:
        return None
    best: tuple[float, int, int, float, float] | None = None
    for g in range(own.shape[1]):
        x = own[:, g]
        split = _split(x)
        before, after = x[:split], x[split:]
        if min(len(before), len(after)) < MIN_BEFORE:
            continue
        low, high = float(np.median(before)), float(np.median(after))
        # Apart beyond doubt: nearly all of the one above nearly all of the other.
        clear = np.quantile(after, 0.1) > np.quantile(before, 0.9)
        lasting = clear and high >= LEAST_RATIO * max(low, 1e-5) and high - low >= LEAST_SHARE * step_s
        if lasting and (best is None or high - low > best[0]):
            best = high - low, g, split, low, high
    if best is None:
        return None
    cost, g, split, low, high = best
    evidence = (
        f"its communication takes {1e3 * high:.2f} ms a step when nobody is late, "
        f"{1e3 * low:.2f} ms before step {int(table.steps[split])}; the bytes are the same"
    )
    return _verdict(table, axis, members[g], high / max(low, 1e-5), evidence, cost, step_s, split)


def _split(x: Floats) -> int:
    """The place that leaves least squared deviation of log times on both sides."""
    logs = np.log(np.maximum(x, 1e-6))
    n = np.arange(1, len(x))
    left, square = np.cumsum(logs)[:-1], np.cumsum(logs**2)
    total = logs.sum()
    within = square[-1] - left**2 / n - (total - left) ** 2 / (len(x) - n)
    return int(np.argmin(within)) + 1


def _verdict(
    table: StepTable, axis: str, columns: npt.NDArray[np.int64], ratio: float, evidence: str, cost: float,
    step_s: float, since: int,
) -> Verdict:  # fmt: skip
    ranks = tuple(table.ranks[c] for c in columns)
    hosts = sorted({table.hosts.get(r, "") for r in ranks} - {""})
    where = f" ({', '.join(hosts[:4])})" if len(hosts) > 1 else ""
    told = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return Verdict(
        "link", f"the link of {axis} between ranks {told}{where} is slow: {ratio:.1f} times the usual time",
        evidence,
        "check the cable, switch port and NIC counters between these ranks, and NCCL_DEBUG=INFO for a fallback path",
        cost, cost / step_s, ranks, axis, int(table.steps[since]),
    )  # fmt: skip
