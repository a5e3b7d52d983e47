"""Loops that ask an event or a stream whether it is done: each is one wait."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import numpy as np

from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.link import Launches, launch_times

POLL = re.compile(r"(?:Event|Stream)Query")
_APART_NS = 2_000_000
_SHORTEST_NS = 20_000
"""What is over sooner may be an allocator that looks which blocks have become free."""


@dataclass(slots=True)
class Loops:
    """Runtime calls with each loop as one: from its first question to the answer."""

    calls: Calls
    place: Ints
    """Index in ``calls`` of each of the trace's runtime calls."""
    target: Ints
    """By call: the activity that the loop waited for; -1 for what is no loop."""
    count: Ints
    """By call: questions asked; 1 for what is no loop."""


def join_loops(trace: RankTrace, launches: Launches) -> Loops:
    """A run of questions is a loop if something that was launched before ended just before the last of them."""
    runtime, device = trace.runtime, trace.device
    n = len(runtime)
    kept, end = np.ones(n, bool), runtime.end.copy()
    target, count, place = np.full(n, -1, np.int64), np.ones(n, np.int64), np.arange(n)
    asks = np.array([POLL.search(s) is not None for s in trace.names], bool)
    if n and len(device) and (asking := asks[runtime.name]).any():
        order = np.argsort(runtime.thread, kind="stable")
        a, b = order[:-1], order[1:]
        more = asking[a] & asking[b] & (runtime.thread[a] == runtime.thread[b])
        more &= runtime.start[b] - runtime.end[a] <= _APART_NS
        run = np.concatenate([[0], np.cumsum(~more)])
        first = np.flatnonzero(np.diff(run, prepend=-1))
        length = np.diff(np.append(first, n))
        launched = launch_times(trace, launches)
        by_end = np.argsort(device.end, kind="stable")
        ends = device.end[by_end]
        for f, m in zip(first[length > 1].tolist(), length[length > 1].tolist(), strict=True):
            members = order[f : f + m]
            begin, until = runtime.start[members[0]], runtime.end[members[-1]]
            if until - begin < _SHORTEST_NS:
                continue
            # The last question but one was still answered no.
            i, j = np.searchsorted(ends, (runtime.start[members[-2]], until), "right")
            ended = by_end[i:j][launched[by_end[i:j]] <= begin]
            if ended.size:
                kept[members[1:]] = False
                end[members[0]], target[members[0]], count[members[0]] = until, ended[-1], m
                place[members] = members[0]
    number = np.cumsum(kept) - 1
    columns = [end if f.name == "end" else getattr(runtime, f.name) for f in fields(Calls)]
    return Loops(Calls(*(c[kept] for c in columns)), number[place], target[kept], count[kept])
