"""The trace as a graph of what waited for what.

Nodes are host calls and device activities. An activity starts after the one before it on its stream, after
its launch, and after the activity of another stream it waits for; a host call starts after the one before it on its
thread, after what the thread waited for (``hostwaits``), or after the thread that handed over to it; a call that
blocks ends after what it waited for. Each dependency has its *lag*: what passes between the cause and its effect. The
lag of the cause that held a node up is what the trace shows, that of the others what is usual, so with nothing changed
a replay reproduces the trace exactly, and a change moves all that depended on it and nothing else.

After Holmes et al.'s and HTA's critical path, and what-if analysis as in Daydream (Zhu et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainsys.profiler.trace.classify import CLASS_NAMES
from trainsys.profiler.trace.columns import Calls, RankTrace
from trainsys.profiler.trace.edges import Edges, flat, greatest
from trainsys.profiler.trace.fetches import worker_fetches
from trainsys.profiler.trace.hostwaits import HostWaits, find_waits
from trainsys.profiler.trace.idle import data_spans
from trainsys.profiler.trace.intervals import Ints, covered
from trainsys.profiler.trace.link import Launches
from trainsys.profiler.trace.relaunch import with_lost_launches
from trainsys.profiler.trace.streamwaits import called_for, seen_near
from trainsys.profiler.trace.usual import Usual, usual

_NONE = -1
HOST, SYNCED = len(CLASS_NAMES), len(CLASS_NAMES) + 1
KIND_NAMES = (*CLASS_NAMES, "host", "sync")
_NEVER = np.iinfo(np.int64).min


@dataclass(slots=True)
class Graph:
    """Nodes in an order in which causes come first, as columns; what is a node is -1 where there is none. Times in ns.

    A node without causes starts when it did. Between two calls a host thinks, may wait for the device without a call,
    and thinks again: ``before``, ``gap`` and ``rest``.
    """

    start: Ints
    end: Ints
    kind: Ints
    """Class of a device activity (``classify``); HOST or SYNCED (it waited for the device) for a host call."""
    name: Ints
    length: Ints
    """What the node takes by itself: of a call that waited, without the waiting."""
    causes: Edges
    """Dependencies of activities on activities."""
    blocked: Edges
    """For each call, what must have ended before it ends."""
    launch: Ints
    """Each activity's launch, which it follows after ``launch_lag`` from that call's start."""
    launch_lag: Ints
    program: Ints
    """Each call's predecessor in its thread."""
    before: Ints
    gap: Ints
    rest: Ints
    data: Ints
    """The part of the rest that is spent in a data loader."""
    held_by: Ints
    """The node that the gap was, or may have been, a wait for."""
    back: Ints
    """From that node's end to the gap's; negative where it freed the host before its end."""
    sure: npt.NDArray[np.bool_]
    fetch: Ints
    """For a call that follows a batch which loader workers were late with: the call after the last batch."""
    since: Ints
    """From the end of that one."""
    inferred: int
    """Dependencies that were inferred: between streams, and of the host on the device."""


def build(trace: RankTrace, kinds: Ints, launches: Launches) -> Graph:
    recorded = launches
    trace, launches = with_lost_launches(trace, launches)
    waits = find_waits(trace, launches)
    calls, device = waits.calls, trace.device
    nh, nd = len(calls), len(device)
    call, target = flat(waits.targets)
    start, end = np.concatenate([calls.start, device.start]), np.concatenate([calls.end, device.end])
    # Host calls by start; an activity by start too, after its launch; a call that waits, and one that comes after a
    # wait, stands after what it waited for.
    key = start.copy()
    key[call] = end[call]
    order = np.lexsort((np.arange(nh + nd) >= nh, key))
    place = np.empty(nh + nd, np.int64)
    place[order] = np.arange(nh + nd)
    synced = np.zeros(nh, bool)
    synced[call[device.end[target] > calls.start[call]]] = True
    u = usual(trace, recorded, calls, waits.targets)
    by = np.full(nd, _NONE, np.int64)
    by[launches.index >= 0] = waits.place[launches.index[launches.index >= 0]]
    of_device, causes, between = _activities(trace, launches, u, place, calls, by)
    of_calls, gaps = _calls(trace, waits, place)
    own, blocked = _blocking(trace, calls, u, place, call, target)

    def column(calls_: Ints, activities: Ints) -> Ints:
        return np.concatenate([calls_, activities])[order]

    of_call: dict[str, Any] = {
        k: column(v, np.full(nd, _NONE if k in _NODES else k == "sure", v.dtype)) for k, v in of_calls.items()
    }
    none = np.full(nh, _NONE, np.int64)
    return Graph(
        start[order],
        end[order],
        column(np.where(synced, SYNCED, HOST).astype(np.int64), kinds.astype(np.int64)),
        column(calls.name, device.name),
        column(own, device.end - device.start),
        causes,
        blocked,
        column(none, of_device["launch"]),
        column(none * 0, of_device["launch_lag"]),
        **of_call,
        inferred=between + gaps,
    )


_NODES = ("program", "held_by", "fetch")


def _activities(
    trace: RankTrace, launches: Launches, u: Usual, place: Ints, calls: Calls, by: Ints
) -> tuple[dict[str, Ints], Edges, int]:
    """(by activity its launch and lag, edges on activities, how many of these were inferred)."""
    device, nd = trace.device, len(trace.device)
    node, each = place[len(calls) :], np.arange(nd)
    before, near = seen_near(trace, launches)
    called_of, called = flat(called_for(trace, launches))
    inferred = int((near >= 0).sum() + (called == near[called_of]).sum())
    of, other = np.concatenate([each, called_of, each]), np.concatenate([before, called, near])
    lag = np.concatenate([np.full(nd, u.gap), np.full(of.size - nd, u.cross)])
    order = np.argsort(of, kind="stable")
    order = order[other[order] >= 0]
    order = order[node[other[order]] < node[of[order]]]
    of, other, lag = of[order], other[order], lag[order]
    # Each cause once: the first of its lags.
    pair = of * nd + other
    sorted_ = np.argsort(pair, kind="stable")
    first = np.sort(sorted_[np.diff(pair[sorted_], prepend=-1) > 0])
    of, other = of[first], other[first]
    begin, left = device.start[of], device.end[other]
    # Streams that overlap themselves (graphs, damaged times): after its begin is all that is known.
    lag = np.minimum(lag[first], begin - left)
    ready = greatest(of, left + lag, nd, _NEVER)
    launched = by >= 0
    launched[launched] = place[by[launched]] < node[launched]
    launch = np.where(launched, by, 0) if len(calls) else by
    launch_start = calls.start[launch] if len(calls) else device.start
    launch_lag = np.minimum(u.latency, device.start - launch_start)
    by_launch = launched & (launch_start + launch_lag >= ready)
    launch_lag = np.where(by_launch, device.start - launch_start, launch_lag)
    # Else the cause that was ready last held it up, with all that passed since.
    last = np.flatnonzero((~by_launch & (ready < device.start))[of] & (left + lag == ready[of]))
    last = last[np.diff(of[last], prepend=-1) > 0]
    lag[last] = begin[last] - left[last]
    columns = {
        "launch": np.where(launched, place[launch], _NONE),
        "launch_lag": np.where(launched, launch_lag, 0),
    }
    return columns, Edges(node[of], node[other], lag), inferred


def _calls(trace: RankTrace, waits: HostWaits, place: Ints) -> tuple[dict[str, Any], int]:
    """(by call what the host did since the call before it, as the graph's columns; gaps that were waits)."""
    calls, handed, device = waits.calls, waits.handed, trace.device
    nh = len(calls)
    at = place[:nh]
    cause = np.where(handed >= 0, handed, waits.before)
    left = calls.end[np.maximum(cause, 0)] if nh else calls.end
    since = np.where(cause >= 0, left, calls.start)
    i = np.array(list(waits.gaps), np.int64)
    found = list(waits.gaps.values())
    low, high, activity = (
        np.array([getattr(g, c) for g in found], np.int64) for c in ("low", "high", "activity")
    )
    sure = np.array([g.sure for g in found], bool)
    since[i] = high
    data = covered(data_spans(trace), np.minimum(since, calls.start), calls.start)
    program = np.where(cause >= 0, at[np.maximum(cause, 0)], _NONE) if nh else cause
    program = np.where(program < at, program, _NONE)
    follows = program >= 0
    rest = np.where(follows, calls.start - left, 0)
    held = place[nh + activity]
    ok = (activity >= 0) & (held < at[i]) & follows[i]
    i, low, high, held, sure, activity = (c[ok] for c in (i, low, high, held, sure, activity))
    out: dict[str, Any] = {
        "program": program,
        **{c: np.zeros(nh, np.int64) for c in ("before", "gap")},
        "rest": rest,
        "data": np.where(follows, np.minimum(data, np.maximum(rest, 0)), 0),
        "held_by": np.full(nh, _NONE, np.int64),
        "back": np.zeros(nh, np.int64),
        "sure": np.ones(nh, bool),
    }
    of_gaps = (
        low - left[i],
        high - low,
        calls.start[i] - high,
        data[i],
        held,
        high - device.end[activity],
        sure,
    )
    for name, values in zip(
        ("before", "gap", "rest", "data", "held_by", "back", "sure"), of_gaps, strict=True
    ):
        out[name][i] = values
    fetch = worker_fetches(trace, calls)
    known = fetch >= 0
    known[known] = at[fetch[known]] < at[known]
    out["fetch"], out["since"] = np.full(nh, _NONE, np.int64), np.zeros(nh, np.int64)
    out["fetch"][known] = at[fetch[known]]
    out["since"][known] = calls.start[known] - calls.end[fetch[known]]
    return out, int(sure.sum())


def _blocking(
    trace: RankTrace, calls: Calls, u: Usual, place: Ints, call: Ints, target: Ints
) -> tuple[Ints, Edges]:
    """(what each call takes by itself, edges of the calls that wait)."""
    nh = len(calls)
    node = place[nh + target]
    earlier = node < place[call]
    call, node, ended = call[earlier], node[earlier], trace.device.end[target[earlier]]
    last = np.maximum(greatest(call, ended, nh, _NEVER), calls.start)
    own = calls.end - calls.start
    usually = np.full(len(trace.names), np.iinfo(np.int64).max)
    usually[list(u.own)] = list(u.own.values())
    own = np.where(last > calls.start, np.minimum(own, usually[calls.name]), own)
    end = calls.end[call]
    lag = np.where(last[call] > calls.start[call], end - last[call], np.minimum(end - ended, u.back))
    return own, Edges(place[call], node, lag)
