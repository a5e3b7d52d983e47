"""How long things usually take on this machine: what passes between a cause and its effect where nothing else held it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.edges import flat, greatest
from trainsys.profiler.trace.intervals import Ints, distinct
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.streamwaits import NEAR_NS, seen_near


@dataclass(slots=True)
class Usual:
    """ns. Where the trace shows none: a microsecond, or nothing for the way back."""

    latency: int = 1_000
    """From the start of a launch to that of its activity on an idle stream."""
    gap: int = 1_000
    """Between neighbours on a stream."""
    cross: int = 1_000
    """From an activity of another stream."""
    back: int = 0
    """From the end of what a call waited for to its return."""
    own: dict[int, int] = field(default_factory=dict)
    """By name, a call that waits for nothing."""


def usual(trace: RankTrace, launches: Launches, calls: Calls, targets: list[tuple[int, ...]]) -> Usual:
    out = Usual()
    device = trace.device
    if not len(device):
        return out
    before, near = seen_near(trace, launches)
    idle_since = np.where(before >= 0, device.end[np.maximum(before, 0)], np.iinfo(np.int64).min)
    since, after_launch = device.start - idle_since, device.start - launches.start
    linked = launches.index >= 0
    out.latency = _middle(after_launch[linked & (idle_since < launches.start) & (near < 0)], out.latency)
    queued = linked & (before >= 0) & (since >= 0) & (since < NEAR_NS) & (after_launch > 2 * out.latency)
    out.gap = _middle(since[queued & (near < 0)], out.gap)
    crossed = near >= 0
    out.cross = _middle((device.start - device.end[np.maximum(near, 0)])[crossed], out.cross)
    if not len(calls):
        return out
    call, target = flat(targets)
    last = greatest(call, device.end[target], len(calls), -1)
    waited = last > calls.start
    out.back = _middle((calls.end - last)[waited])
    length = calls.end - calls.start
    for name in distinct(calls.name[waited]).tolist():
        free = length[(calls.name == name) & ~waited]
        same = length[calls.name == name] if not free.size else free
        out.own[name] = int(np.median(same)) if free.size else int(same.min())
    typical = int(np.median(length[~waited])) if (~waited).any() else 0
    out.own = {n: min(v, typical) if typical else v for n, v in out.own.items()}
    return out


def _middle(values: Ints, none: int = 0) -> int:
    return int(np.median(values)) if values.size else none
