"""One trace file to its report: read, classify, link, account. What a worker process runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainsys.profiler.trace.breakdown import break_down
from trainsys.profiler.trace.classify import COMM, classify
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.commlist import CommList, list_communications
from trainsys.profiler.trace.hostside import break_down_host
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.kernels import kernel_rows, launch_stats
from trainsys.profiler.trace.link import Launches, link_launches
from trainsys.profiler.trace.reader import read_trace
from trainsys.profiler.trace.report import RankReport
from trainsys.profiler.trace.roofline import products
from trainsys.profiler.trace.source import Limits


@dataclass(frozen=True, slots=True)
class Options:
    """How to read."""

    limits: Limits | None = None
    keep_truncated: bool = False


@dataclass(slots=True)
class Analysed:
    """What a worker hands back: small whatever the file's size."""

    report: RankReport
    comms: CommList
    device_memory: int


@dataclass(slots=True)
class Loaded:
    """A trace with its classes and links, for analyses that need the columns."""

    trace: RankTrace
    kinds: Ints
    launches: Launches


def load(path: Path, options: Options) -> Loaded:
    trace = read_trace(path, limits=options.limits, keep_truncated=options.keep_truncated)
    return Loaded(trace, classify(trace), link_launches(trace))


def analyse_file(path: Path, options: Options) -> Analysed:
    """Raises UserError for what :func:`read_trace` refuses."""
    loaded = load(path, options)
    trace, kinds, launches = loaded.trace, loaded.kinds, loaded.launches
    comms = list_communications(trace, kinds)
    breakdown = break_down(trace, kinds, launches) or break_down_host(trace, comms)
    rows, work = products(trace, kinds, launches)
    if launches.unlinked:
        trace.said["unlinked: device activities without a recorded launch"] += launches.unlinked
    unsized = int((comms.size < 0).sum())
    if unsized:
        trace.said["unknown: communications without a message size"] += unsized
    return Analysed(
        RankReport(
            str(path),
            trace.rank,
            trace.world,
            trace.device_name,
            trace.host,
            trace.n_events,
            trace.size_bytes,
            breakdown,
            kernel_rows(trace, kinds),
            launch_stats(trace, launches),
            rows,
            work,
            None,
            "",
            dict(trace.said),
        ),
        comms,
        trace.device_memory,
    )


def waits_of(loaded: Loaded, wait_by_start: dict[int, int]) -> Ints:
    """Per device activity, the ns it waited for other ranks; ``wait_by_start`` by the activity's start."""
    starts = loaded.trace.device.start
    out = np.zeros(len(loaded.trace.device), np.int64)
    if wait_by_start:
        known = np.array(sorted(wait_by_start), np.int64)
        waits = np.array([wait_by_start[int(k)] for k in known], np.int64)
        at = np.minimum(np.searchsorted(known, starts), known.size - 1)
        hit = (known[at] == starts) & (loaded.kinds == COMM)
        out[hit] = waits[at[hit]]
    return out
