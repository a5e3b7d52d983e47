"""What the device's time was spent on by kernel, how kernels were launched, and what short ones cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.classify import CLASS_NAMES, COMPUTE
from trainsys.profiler.trace.columns import KERNEL, RankTrace
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.link import Launches

SHORT_NS = 10_000
"""A kernel shorter than this costs about as much to launch as to run: launching takes 5-10 us of host time."""
KEEP_NAMES = 400


@dataclass(frozen=True, slots=True)
class KernelRow:
    """All launches of one kernel name; ``kind`` is one of ``classify.CLASS_NAMES``."""

    name: str
    kind: str
    count: int
    total_ns: int
    max_ns: int


@dataclass(frozen=True, slots=True)
class LaunchStats:
    """How the host kept the device supplied.

    ``delay``: from the launching call's start to the activity's start, median and 95th percentile, ns.
    ``queue_max``/``queue_mean``: activities launched and not begun, at launch instants. ``empty_share``:
    share of launches that found an empty queue. ``short_*``: kernels under ``SHORT_NS`` and the idle time
    directly before them, which fusing or a CUDA graph would remove. ``graph_*``: kernels from CUDA graphs.
    """

    linked: int = 0
    unlinked: int = 0
    delay_p50_ns: int = 0
    delay_p95_ns: int = 0
    queue_max: int = 0
    queue_mean: float = 0.0
    empty_share: float = 0.0
    short_count: int = 0
    short_ns: int = 0
    short_idle_ns: int = 0
    graph_count: int = 0
    graph_ns: int = 0


def kernel_rows(trace: RankTrace, kinds: Ints) -> list[KernelRow]:
    """By total time, longest first; past ``KEEP_NAMES`` the rest is one row."""
    device = trace.device
    if not len(device):
        return []
    length = device.end - device.start
    n = len(trace.names)
    code = device.name * len(CLASS_NAMES) + kinds
    totals = np.bincount(code, length, n * len(CLASS_NAMES)).astype(np.int64)
    counts = np.bincount(code, minlength=n * len(CLASS_NAMES))
    longest = np.zeros(n * len(CLASS_NAMES), np.int64)
    np.maximum.at(longest, code, length)
    present = np.flatnonzero(counts)
    present = present[np.argsort(-totals[present], kind="stable")]
    rows = [
        KernelRow(
            trace.names[c // len(CLASS_NAMES)],
            CLASS_NAMES[c % len(CLASS_NAMES)],
            int(counts[c]),
            int(totals[c]),
            int(longest[c]),
        )
        for c in present[:KEEP_NAMES].tolist()
    ]
    rest = present[KEEP_NAMES:]
    if rest.size:
        rows.append(
            KernelRow(
                f"({rest.size} further names)",
                CLASS_NAMES[COMPUTE],
                int(counts[rest].sum()),
                int(totals[rest].sum()),
                int(longest[rest].max()),
            )
        )
    return rows


def _percentile(values: Ints, share: float) -> int:
    """Between the two nearest of the sorted values. ``np.percentile`` imports masked arrays for the same number."""
    at = share * (values.size - 1)
    i = int(at)
    below, above = np.partition(values, (i, min(i + 1, values.size - 1)))[[i, min(i + 1, values.size - 1)]].tolist()
    part = at - i
    return int(below + (above - below) * part if part < 0.5 else above - (above - below) * (1 - part))


def launch_stats(trace: RankTrace, launches: Launches) -> LaunchStats:
    device = trace.device
    if not len(device):
        return LaunchStats()
    linked = np.flatnonzero(launches.index >= 0)
    length = device.end - device.start
    delay = device.start[linked] - launches.start[linked]
    queue_max = 0
    queue_mean = empty_share = 0.0
    if linked.size:
        begun = np.sort(device.start[linked])
        launched = np.sort(launches.start[linked])
        waiting = np.arange(linked.size) - np.searchsorted(begun, launched, "right")
        waiting = np.maximum(waiting, 0)
        queue_max, queue_mean = int(waiting.max()), float(waiting.mean())
        empty_share = float((waiting == 0).mean())
    kernels = device.kind == KERNEL
    short = np.flatnonzero(kernels & (length < SHORT_NS))
    graph_calls = np.array(["GraphLaunch" in n for n in trace.names], bool)
    from_graph = device.graph > 0
    if len(trace.runtime):
        from_graph |= (launches.index >= 0) & graph_calls[trace.runtime.name[np.maximum(launches.index, 0)]]
    from_graph &= kernels
    return LaunchStats(
        linked=int(linked.size),
        unlinked=launches.unlinked,
        delay_p50_ns=_percentile(delay, 0.5) if linked.size else 0,
        delay_p95_ns=_percentile(delay, 0.95) if linked.size else 0,
        queue_max=queue_max,
        queue_mean=round(queue_mean, 2),
        empty_share=round(empty_share, 4),
        short_count=int(short.size),
        short_ns=int(length[short].sum()),
        short_idle_ns=_idle_before(trace, short),
        graph_count=int(from_graph.sum()),
        graph_ns=int(length[from_graph].sum()),
    )


def _idle_before(trace: RankTrace, chosen: Ints) -> int:
    """Device-wide idle time that ends at the start of one of the chosen activities."""
    device = trace.device
    if not chosen.size:
        return 0
    busy = iv.union(device.start, device.end)
    gap = np.append(np.int64(0), busy[0][1:] - busy[1][:-1])
    starts = iv.distinct(device.start[chosen])
    at = np.searchsorted(busy[0], starts)
    at = np.minimum(at, busy[0].size - 1)
    hit = iv.distinct(at[busy[0][at] == starts])
    return int(gap[hit].sum())
