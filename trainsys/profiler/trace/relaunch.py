"""Launches that the recorder lost, put back where they must have been.

An activity whose launch is missing still has its correlation, and these count up as the host launches: so the launch
was between those of the neighbours in that order, shortly before the activity started if it did so at once.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.link import Launches, link_launches

_MOST = 0.2
"""Where more are missing than this share, the launches were not recorded rather than lost."""
_IDLE_NS = 5_000
"""What starts this soon after an end was held up by it."""


def with_lost_launches(trace: RankTrace, launches: Launches) -> tuple[RankTrace, Launches]:
    """Trace and links with a call of no length for each lost launch whose neighbours launched from one thread."""
    device, runtime = trace.device, trace.runtime
    linked = launches.index >= 0
    lost = np.flatnonzero(~linked & (device.correlation > 0))
    known = np.flatnonzero(linked)
    if not lost.size or known.size < 2 or lost.size > _MOST * len(device):
        return trace, launches
    known = known[np.argsort(device.correlation[known], kind="stable")]
    at = np.searchsorted(device.correlation[known], device.correlation[lost])
    within = (at > 0) & (at < known.size)
    lost, at = lost[within], at[within]
    left, right = known[at - 1], known[at]
    latency = int(np.maximum(device.start[known] - launches.start[known], 0).min())
    # What started as something else ended had been launched some time before, as early as can be: not while the host
    # waited for it. Anything else started as soon as it was launched.
    ends = np.sort(device.end)
    nearest = ends[np.maximum(np.searchsorted(ends, device.start[lost], "right") - 1, 0)]
    queued = (device.start[lost] >= nearest) & (device.start[lost] - nearest < _IDLE_NS)
    when = np.where(queued, launches.end[left], device.start[lost] - latency)
    when = np.minimum(when, launches.start[right])
    good = (launches.thread[left] == launches.thread[right]) & (when >= launches.end[left])
    lost, when, right = lost[good], when[good], right[good]
    if not lost.size:
        return trace, launches
    added = {
        "start": when,
        "end": when,
        "name": runtime.name[launches.index[right]],
        "thread": launches.thread[right],
        "correlation": device.correlation[lost],
    }
    columns = {f.name: np.concatenate([getattr(runtime, f.name), added[f.name]]) for f in fields(Calls)}
    order = np.argsort(columns["start"], kind="stable")
    out = replace(trace, runtime=Calls(**{name: column[order] for name, column in columns.items()}))
    return out, link_launches(out)
