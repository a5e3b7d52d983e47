"""One trace file to its report: read, classify, link, account. What a worker process runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainsys.hardware import Device, match_device
from trainsys.profiler.trace.breakdown import break_down
from trainsys.profiler.trace.classify import COMM, classify
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.commlist import CommList, list_communications
from trainsys.profiler.trace.hostside import break_down_host
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.kernels import kernel_rows, launch_stats
from trainsys.profiler.trace.link import Launches, link_launches
from trainsys.profiler.trace.reader import read_trace
from trainsys.profiler.trace.report import Mfu, RankReport
from trainsys.profiler.trace.roofline import ProductRow, Work, peak_of, products
from trainsys.profiler.trace.source import Limits


@dataclass(frozen=True, slots=True)
class Options:
    """How to read. ``device`` overrides the catalogue's match by the name in the trace."""

    limits: Limits | None = None
    keep_truncated: bool = False
    device: Device | None = None


@dataclass(slots=True)
class Analysed:
    """What a worker hands back: small whatever the file's size."""

    report: RankReport
    comms: CommList


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
    device = options.device or _match(trace)
    rows, work = products(trace, kinds, launches, device)
    if launches.unlinked:
        trace.said["unlinked: device activities without a recorded launch"] += launches.unlinked
    unsized = int((comms.size < 0).sum())
    if unsized:
        trace.said["unknown: communications without a message size"] += unsized
    return Analysed(
        RankReport(
            str(path), trace.rank, trace.world, trace.device_name, trace.host, trace.n_events, trace.size_bytes,
            breakdown, kernel_rows(trace, kinds), launch_stats(trace, launches), rows, work,
            _mfu(breakdown.whole.span, rows, work, device) if breakdown and device else None,
            device.name if device else "", dict(trace.said),
        ),
        comms,
    )  # fmt: skip


def _match(trace: RankTrace) -> Device | None:
    return match_device(trace.device_name, trace.device_memory / 2**30 or None) if trace.device_name else None


def _mfu(span_ns: int, rows: list[ProductRow], work: Work, device: Device) -> Mfu | None:
    """Matrix-product FLOPs from shapes over the span, at the peak of the dtype that did most of them."""
    if not work.products or not span_ns:
        return None
    by_dtype: dict[str, int] = {}
    for row in rows:
        by_dtype[row.dtype] = by_dtype.get(row.dtype, 0) + row.flops
    dtype = max(by_dtype, key=lambda d: by_dtype[d], default="")
    peak = peak_of(device, dtype)
    if peak is None:
        return None
    return Mfu(
        round(work.products / (span_ns / 1e9 * peak), 6),
        "matrix products from recorded shapes, recompute included, no attention, no convolutions",
        f"{device.name} {dtype} dense {peak / 1e12:g} TFLOP/s",
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
