"""One trace file to its report: read, classify, link, account. What a worker process runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from trainsys.errors import UserError
from trainsys.profiler.trace.breakdown import break_down
from trainsys.profiler.trace.classify import COMM, classify
from trainsys.profiler.trace.columns import Activities, RankTrace
from trainsys.profiler.trace.commlist import CommList, list_communications
from trainsys.profiler.trace.health import examine
from trainsys.profiler.trace.hostside import break_down_host
from trainsys.profiler.trace.intervals import Ints, distinct
from trainsys.profiler.trace.kernels import kernel_rows, launch_stats
from trainsys.profiler.trace.lanes import Busy, busy_of
from trainsys.profiler.trace.link import Launches, host_steps, link_launches
from trainsys.profiler.trace.reader import name_device, read_trace
from trainsys.profiler.trace.report import RankReport
from trainsys.profiler.trace.roofline import products
from trainsys.profiler.trace.source import Limits


@dataclass(frozen=True, slots=True)
class Options:
    """How to read."""

    limits: Limits | None = None
    keep_truncated: bool = False
    timeline_of: int = 0
    """Keep what was busy when, for a timeline of so many files; 0: none."""


@dataclass(slots=True)
class Analysed:
    """What a worker hands back: small whatever the file's size."""

    report: RankReport
    comms: CommList
    device_memory: int
    stated: bool
    """The rank is the file's own word."""
    span: tuple[int, int]
    steps: list[int]
    lanes: list[RankReport] = field(default_factory=list)
    """The file's further devices: lanes of their own, busiest first."""
    busy: Busy | None = None


@dataclass(slots=True)
class Loaded:
    """A trace with its classes and links, for analyses that need the columns."""

    trace: RankTrace
    kinds: Ints
    launches: Launches


def load(path: Path, options: Options, device: int | None = None) -> Loaded:
    """``device``: of a file with several, the one whose activities are kept; None: the busiest."""
    trace = read_trace(path, limits=options.limits, keep_truncated=options.keep_truncated)
    found = _devices(trace)
    return _loaded(trace if len(found) < 2 else _only(trace, found[0] if device is None else device))


def _loaded(trace: RankTrace) -> Loaded:
    return Loaded(trace, classify(trace), link_launches(trace))


def _devices(trace: RankTrace) -> list[int]:
    """The devices with activities, busiest first."""
    device = trace.device
    found: list[int] = distinct(device.device).tolist()
    if len(found) < 2:
        return found
    busy = {d: int((device.end - device.start)[device.device == d].sum()) for d in found}
    return sorted(found, key=lambda d: (-busy[d], d))


def _only(trace: RankTrace, device: int) -> RankTrace:
    chosen = trace.device.device == device
    columns = [getattr(trace.device, f.name)[chosen] for f in fields(Activities)]
    out = replace(trace, device=Activities(*columns))
    name_device(out)
    return out


def analyse_file(path: Path, options: Options, keep: dict[int | None, Loaded] | None = None) -> Analysed:
    """Raises UserError for what :func:`read_trace` refuses. ``keep`` takes the columns, by lane."""
    trace = read_trace(path, limits=options.limits, keep_truncated=options.keep_truncated)
    found = _devices(trace)
    if len(found) < 2:
        return _analysed(path, trace, None, options, keep)
    out, *others = [_analysed(path, _only(trace, d), d, options, keep) for d in found]
    out.lanes = [o.report for o in others]
    return out


def _analysed(
    path: Path,
    trace: RankTrace,
    device: int | None,
    options: Options,
    keep: dict[int | None, Loaded] | None,
) -> Analysed:
    loaded = _loaded(trace)
    if keep is not None:
        keep[device] = loaded
    kinds, launches = loaded.kinds, loaded.launches
    comms = list_communications(trace, kinds, launches)
    breakdown = break_down(trace, kinds, launches) or break_down_host(trace, comms)
    if breakdown is None or not (len(trace.device) or trace.host_busy[0].size or len(comms)):
        raise UserError(_nothing_timed(path, trace))
    rows, work = products(trace, kinds, launches)
    if launches.unlinked:
        trace.said["unlinked: device activities without a recorded launch"] += launches.unlinked
    unsized = int((comms.size < 0).sum())
    if unsized:
        trace.said["unknown: communications without a message size"] += unsized
    report = RankReport(
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
        lane=device,
        health=examine(trace, launches),
    )
    steps = [n for _, _, n in host_steps(trace)]
    busy = busy_of(trace, kinds, comms, options.timeline_of) if options.timeline_of else None
    return Analysed(report, comms, trace.device_memory, trace.stated, trace.span, steps, busy=busy)


def _nothing_timed(path: Path, trace: RankTrace) -> str:
    if not trace.n_events:
        return f"{path}: no events in it: the profiler recorded nothing; stop it before exporting (byte 0)"
    return (
        f"{path}: {trace.n_events} events and none of them is a timed activity of a device or operator: record with "
        "activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] and export after the profiler has stopped"
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
