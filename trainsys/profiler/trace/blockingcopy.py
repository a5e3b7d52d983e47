"""Copies whose call returns only when they are over: one call that submits, and one that waits."""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.lookup import HELD_NS
from trainsys.profiler.trace.polling import Loops

_COPY = re.compile(r"Memcpy")


def split_copies(trace: RankTrace, launches: Launches, loops: Loops) -> Loops:
    """The submitting call takes no time and is what launches; the other one's target is the copy itself."""
    calls, device = loops.calls, trace.device
    copies = np.array([_COPY.search(s) is not None for s in trace.names], bool)
    pageable = np.array(["Pageable" in s for s in trace.names], bool)
    linked = np.flatnonzero(launches.index >= 0)
    call = loops.place[launches.index[linked]]
    long = (calls.end[call] - calls.start[call] >= HELD_NS) | pageable[device.name[linked]]
    blocks = copies[calls.name[call]] & long & (device.end[linked] <= calls.end[call])
    if not blocks.any():
        return loops
    own = np.full(len(calls), -1, np.int64)
    own[call[blocks]] = linked[blocks]
    rows = np.repeat(np.arange(len(calls)), 1 + (own >= 0))
    second = np.concatenate([[False], rows[1:] == rows[:-1]])
    submits = np.concatenate([second[1:], [False]])
    columns = {f.name: getattr(calls, f.name)[rows] for f in fields(Calls)}
    columns["end"] = np.where(submits, columns["start"], columns["end"])
    first = np.searchsorted(rows, np.arange(len(calls)))
    target = np.where(second, own[rows], loops.target[rows])
    return Loops(Calls(**columns), first[loops.place], target, loops.count[rows])
