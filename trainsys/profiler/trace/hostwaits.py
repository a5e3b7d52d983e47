"""When the host waited for the device, though no trace says so: by what ended when it went on.

A program waits in many ways. It calls something that blocks (a synchronise, a copy of pageable memory, a launch while
the queue is full), asks an event again and again, or reads a word that a kernel writes and calls nothing at all. Common
to all is that the host goes on just as something ends that it had launched before. A gap between calls is taken for
such a wait where that is no accident: kernels end often, and what ends once in 20 us ends near anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trainsys.profiler.trace.blockingcopy import split_copies
from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.gaps import Gap, find_gaps
from trainsys.profiler.trace.idle import SYNC
from trainsys.profiler.trace.intervals import Ints, among
from trainsys.profiler.trace.launchqueue import queue_targets
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.lookup import CHANCE, HELD_NS, RETURN_NS, Lookup, previous
from trainsys.profiler.trace.polling import Loops, join_loops

_OWN_NS = 50_000
"""A stream's synchronise that returns later than this after the stream's end waited for something else."""
HANDED_NS = 20_000_000
"""A thread goes on within this of the last call of the one that handed over to it, which may have waited meanwhile."""
_WHOLE_DEVICE = re.compile(r"DeviceSynchronize|CtxSynchronize")
_STREAM = re.compile(r"StreamSynchronize")
_NONE = -1


@dataclass(slots=True)
class HostWaits:
    """By call of ``calls``. What indexes activities or calls is -1 where there is none."""

    calls: Calls
    """A polling loop is one call."""
    place: Ints
    """Index in ``calls`` of each of the trace's runtime calls."""
    before: Ints
    """The call before on the same thread."""
    targets: list[tuple[int, ...]]
    """Activities before whose end the call cannot return."""
    handed: Ints
    """The call of another thread after which this thread went on."""
    gaps: dict[int, Gap]
    """By call, the gap before it that was a wait, or may have been."""


def find_waits(trace: RankTrace, launches: Launches) -> HostWaits:
    loops = split_copies(trace, launches, join_loops(trace, launches))
    calls, n = loops.calls, len(loops.calls)
    before = previous(calls.thread, np.arange(n))
    out = HostWaits(calls, loops.place, before, [()] * n, np.full(n, _NONE, np.int64), {})
    if not n or not len(trace.device):
        return out
    look = Lookup(trace, launches, calls, loops)
    _blocking_calls(trace, look, loops, out.targets)
    queue_targets(trace, launches, loops, out.targets)
    begin = np.where(before >= 0, calls.end[np.maximum(before, 0)], calls.start)
    out.handed = _handed(calls, begin, before, look.launching)
    out.gaps = find_gaps(trace, look, calls, np.where(out.handed >= 0, out.handed, before))
    return out


def _blocking_calls(trace: RankTrace, look: Lookup, loops: Loops, targets: list[tuple[int, ...]]) -> None:
    """What calls that block had to wait for. A call that found it done already depends on it all the same."""
    names = trace.names
    kind = [
        "device" if _WHOLE_DEVICE.search(s) else "stream" if _STREAM.search(s)
        else "sync" if SYNC.search(s) else ""
        for s in names
    ]  # fmt: skip
    calls = loops.calls
    may = (loops.target >= 0) | np.array([bool(k) for k in kind], bool)[calls.name]
    may |= calls.end - calls.start >= HELD_NS
    chosen = np.flatnonzero(may)
    columns = (c[chosen].tolist() for c in (calls.start, calls.end, calls.name, calls.thread))
    for i, start, end, name, thread in zip(chosen.tolist(), *columns, strict=True):
        what, long = kind[name], end - start >= HELD_NS
        found: tuple[int, ...] = ()
        if loops.target[i] >= 0:
            found = (int(loops.target[i]),)
        elif what == "device":
            lasts = (look.last_on(lane, start) for lane in look.by_lane)
            found = tuple(a for a in lasts if a >= 0 and look.end[a] <= end)
        elif what == "stream":
            last = look.last_of(thread, start)
            explains = last >= 0 and look.end[last] <= end and (not long or end - look.end[last] <= _OWN_NS)
            found = (last,) if explains else ()
        if not found and (what in ("stream", "sync") or (long and loops.count[i] == 1)):
            # An unknown call is one that waits only where it returns at once when something ends.
            a = look.ended(start if what else max(start, end - RETURN_NS), end, start)
            if a >= 0 and (what or look.chance(start, end) <= CHANCE):
                found = (a,)
        targets[i] = found


def _handed(calls: Calls, begin: Ints, before: Ints, launching: Ints) -> Ints:
    """Threads that take turns, as forward and backward do: the one goes on as the other goes quiet."""
    out = np.full(len(calls), _NONE, np.int64)
    if launching.size < 2:
        return out
    mine = {t: np.flatnonzero(calls.thread == t) for t in launching.tolist()}
    quiet = np.flatnonzero(among(calls.thread, launching) & ((before < 0) | (calls.start - begin >= HELD_NS)))
    for t, theirs in mine.items():
        i = quiet[calls.thread[quiet] != t]
        k = np.searchsorted(calls.start[theirs], calls.start[i]) - 1
        i, k = i[k >= 0], k[k >= 0]
        last, following = theirs[k], theirs[np.minimum(k + 1, theirs.size - 1)]
        ended, at = calls.end[last], calls.start[i]
        good = (k + 1 == theirs.size) | (calls.start[following] - ended >= HELD_NS)
        good &= (before[i] < 0) | (calls.start[last] > begin[i])
        good &= (at >= ended) & (at - ended <= HANDED_NS)
        good &= (out[i] < 0) | (ended > calls.end[out[i]])
        out[i[good]] = last[good]
    return out
