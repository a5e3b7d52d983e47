"""Trace health: what is missing from a recording or contradicts itself, and what can therefore not be said.

Each finding is one line. Those that make a kind of figure untrue name it, and the verdicts of that kind are withheld.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.columns import KERNEL, RankTrace
from trainsys.profiler.trace.intervals import Ints, among
from trainsys.profiler.trace.link import Launches

_OVERLAP_NS = 2_000
"""Kernels of one stream may overlap by this much: rounding, and programmatic dependent launches."""
_OVERLAPPING = 0.05
_LOST = 0.01


@dataclass(frozen=True, slots=True)
class Finding:
    """``spoils``: what is therefore withheld: ``time`` (all of it), ``idle`` (idle time and what follows) or nothing."""

    text: str
    spoils: str = ""


def examine(trace: RankTrace, launches: Launches) -> list[Finding]:
    """The findings of one trace, the gravest first."""
    if not len(trace.device):
        return [
            Finding("no device activity was recorded: times are the host's, and what waits there looks busy")
        ]
    found = [
        *_overlapping(trace),
        *_lost(trace, launches),
        *_untimed(trace),
    ]
    if not len(trace.runtime):
        found.append(
            Finding(
                "no launches were recorded: why the device was idle is not known, nor what the host held up"
            )
        )
    return found


def _overlapping(trace: RankTrace) -> list[Finding]:
    device = trace.device
    kernels = np.flatnonzero(device.kind == KERNEL)
    lane = (device.device * 1_000_003 + device.stream)[kernels]
    sort = np.lexsort((device.start[kernels], lane))
    order = kernels[sort]
    if order.size < 2:
        return []
    same = np.diff(lane[sort]) == 0
    over = int((same & (device.start[order][1:] < device.end[order][:-1] - _OVERLAP_NS)).sum())
    if over <= max(1, _OVERLAPPING * order.size):
        return []
    return [
        Finding(
            f"{over} of {order.size} kernels overlap another on their own stream, which no device does: several "
            "processes wrote into this file, or its timestamps are wrong; no figure of it is to be trusted",
            "time",
        )
    ]


def _lost(trace: RankTrace, launches: Launches) -> list[Finding]:
    """Launches whose work was not recorded."""
    runtime, device = trace.runtime, trace.device
    if not len(runtime):
        return []
    graph = np.array(["GraphLaunch" in n for n in trace.names], bool)[runtime.name]
    launch = np.array(["LaunchKernel" in n or "LaunchCooperative" in n for n in trace.names], bool)[
        runtime.name
    ]
    # Activities before the first launch and launches after the last activity belong to what was not traced.
    inside = runtime.start < device.start.max()
    seen = among(runtime.correlation, device.correlation) & (runtime.correlation >= 0)
    out = []
    bare = int((graph & inside & ~seen).sum())
    if bare:
        out.append(
            Finding(
                f"{bare} of {int(graph.sum())} CUDA graph launches have no kernels in the trace: their time looks idle; "
                "profile with a newer CUPTI, or without graphs",
                "idle",
            )
        )
    lost = int((launch & inside & ~seen).sum())
    if lost > _LOST * int(launch.sum()):
        out.append(
            Finding(
                f"records dropped: {lost} of {int(launch.sum())} kernel launches have no kernel in the trace: their time "
                "looks idle; profile fewer steps at once",
                "idle",
            )
        )
    return out


def _untimed(trace: RankTrace) -> list[Finding]:
    n = trace.said.get(UNTIMED, 0)
    if not n:
        return []
    return [
        Finding(
            f"{n} events have no time of this recording (ts 0, or years away) and are left out of every figure"
        )
    ]


UNTIMED = "dropped: event whose time is not of this recording"


def timed(start: Ints, reference: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which events are of a recording whose events lie about ``reference``: no profile lasts a week."""
    return np.asarray(np.abs(start - reference) < 7 * 86_400 * 10**9)
