"""Batches that loader workers make while the step runs: late ones follow the workers' own pace."""

from __future__ import annotations

import re

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.intervals import Ints, distinct

_WORKERS = re.compile(r"_MultiProcessingDataLoaderIter|\bdata(?:_|\.)?(?:wait|stall)", re.I)
_LATE_NS, _LATE_SHARE = 100_000, 0.02
"""A batch took at least this long to come, and this share of the time between two: less is what fetching costs."""


def worker_fetches(trace: RankTrace, calls: Calls) -> Ints:
    """For the first call after a late batch: the first call after the batch before it; -1 for all others.

    A faster step does not make such a batch come sooner: the time between two of them is the workers'.
    """
    out = np.full(len(calls), -1, np.int64)
    notes = trace.notes
    by_workers = np.array([_WORKERS.search(s) is not None for s in trace.names], bool)
    if not len(notes) or not len(calls) or not (chosen := np.flatnonzero(by_workers[notes.name])).size:
        return out
    length = notes.end[chosen] - notes.start[chosen]
    for thread in distinct(notes.thread[chosen]).tolist():
        here = notes.thread[chosen] == thread
        mine = np.flatnonzero(calls.thread == thread)
        begun = notes.end[chosen[here]]
        first = np.searchsorted(calls.start[mine], begun)
        late = length[here] >= np.maximum(_LATE_NS, _LATE_SHARE * np.diff(begun, prepend=begun[0]))
        for k in range(1, first.size):
            if late[k] and first[k - 1] < first[k] < mine.size:
                out[mine[first[k]]] = mine[first[k - 1]]
    return out
