"""A run without a device (gloo on CPU): the same terms from the host's own events."""

from __future__ import annotations

import numpy as np

from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.breakdown import Breakdown, Terms
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.commlist import CommList
from trainsys.profiler.trace.link import STEP


def break_down_host(trace: RankTrace, comms: CommList) -> Breakdown | None:
    """Matrix products and other operators by host time; communication exposed where no operator runs.

    Operators that merely wait for a collective cannot be told from working ones here: exposed
    communication is a lower bound, and the report says that the times are the host's.
    """
    if trace.span[1] <= trace.span[0]:
        return None
    ops = trace.ops
    products = iv.union(ops.start, ops.end)
    busy = iv.merge(trace.host_busy, products)
    comm = iv.union(comms.start, comms.end)
    exposed = iv.subtract(comm, busy)
    everything = iv.merge(busy, comm)
    label = comms.keys[0].label if len(comms.keys) == 1 else "all groups"
    axis = comms.keys[0].axis if len(comms.keys) == 1 else "several"

    def terms(low: int, high: int, step: int | None) -> Terms:
        def inside(s: iv.Spans) -> int:
            return iv.total(iv.clip(s, low, high))

        t = Terms(low, high, step=step)
        t.matmul, t.comm, t.comm_exposed = inside(products), inside(comm), inside(exposed)
        t.other_compute = inside(busy) - t.matmul
        t.idle = (high - low) - inside(everything)
        if t.comm_exposed:
            t.by_group, t.by_axis = {label: t.comm_exposed}, {axis: t.comm_exposed}
        if t.idle:
            t.idle_by_cause = {"host": t.idle}
        return t

    trace.said["assumed: no device activity; times are the host's"] += 1
    marks = np.array([STEP.match(n) is not None for n in trace.names], bool)
    chosen = np.flatnonzero(marks[trace.notes.name]) if len(trace.notes) else np.zeros(0, np.int64)
    steps = [
        terms(
            int(trace.notes.start[i]),
            int(trace.notes.end[i]),
            int(trace.names[trace.notes.name[i]].split("#")[1]),
        )
        for i in chosen.tolist()
    ]
    return Breakdown(terms(*trace.span, None), steps)
