"""Where a rank's time went, in ns: exclusive terms that sum to the span, whole and by step.

Priority, so that each instant counts once: matmul, other compute, communication that no compute hides,
copies that nothing hides, idle. *Span* runs from the first device activity's start to the last one's end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.classify import COMM, COMPUTE, COPY, MATMUL, axis_of
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.idle import IdleFinder
from trainsys.profiler.trace.intervals import Ints, Spans
from trainsys.profiler.trace.link import Launches, Step, find_steps, inside_calls


@dataclass(slots=True)
class Terms:
    """Nanoseconds of ``[start, end)``; the first five sum to ``span`` exactly."""

    start: int
    end: int
    matmul: int = 0
    other_compute: int = 0
    comm_exposed: int = 0
    memcpy_exposed: int = 0
    idle: int = 0
    comm: int = 0
    """Communication in all, hidden or not."""
    recompute: int = 0
    """Part of matmul and other compute that activation checkpointing ran again."""
    by_group: dict[str, int] = field(default_factory=dict)
    """``comm_exposed`` by process group."""
    by_axis: dict[str, int] = field(default_factory=dict)
    idle_by_cause: dict[str, int] = field(default_factory=dict)
    step: int | None = None

    @property
    def span(self) -> int:
        return self.end - self.start

    @property
    def overlap(self) -> float | None:
        """Share of communication hidden behind compute; None without communication."""
        return (self.comm - self.comm_exposed) / self.comm if self.comm else None


@dataclass(slots=True)
class Breakdown:
    """One rank: the whole trace and each profiler step."""

    whole: Terms
    steps: list[Terms]


def comm_group(trace: RankTrace, index: int) -> tuple[str, str]:
    """(label, axis) of a communication's process group; what a trace without metadata gives is ``unknown``."""
    if index < 0:
        return "unknown", "unknown"
    meta = trace.comm_meta[index]
    description = meta.group_desc
    if description in ("", "undefined") and meta.group in trace.groups:
        description = trace.groups[meta.group][0]
    if not (meta.group or description):
        return "unknown", "unknown"
    label = f"{meta.group}:{description}" if description and description != meta.group else meta.group
    return label, axis_of(description) or "unknown"


def break_down(trace: RankTrace, kinds: Ints, launches: Launches) -> Breakdown | None:
    """None for a trace without device activity (a CPU run: see ``hostside``)."""
    device = trace.device
    if not len(device):
        return None

    def spans(mask: Ints) -> Spans:
        return iv.union(device.start[mask], device.end[mask])

    matmul = spans(np.flatnonzero(kinds == MATMUL))
    compute = iv.merge(matmul, spans(np.flatnonzero(kinds == COMPUTE)))
    comm = spans(np.flatnonzero(kinds == COMM))
    exposed = iv.subtract(comm, compute)
    working = iv.merge(compute, comm)
    copies = iv.subtract(spans(np.flatnonzero(kinds == COPY)), working)
    busy = iv.merge(working, copies)
    recompute = spans(np.flatnonzero(recomputed(trace, kinds, launches)))
    groups = _exposed_by_group(trace, kinds, compute)
    idle = IdleFinder(trace, launches)
    low, high = int(device.start.min()), int(device.end.max())

    def terms(start: int, end: int, step: int | None) -> Terms:
        def inside(s: Spans) -> int:
            return iv.total(iv.clip(s, start, end))

        t = Terms(start, end, step=step)
        t.matmul, t.comm, t.comm_exposed = inside(matmul), inside(comm), inside(exposed)
        t.other_compute = inside(compute) - t.matmul
        t.memcpy_exposed, t.recompute = inside(copies), inside(recompute)
        gaps = iv.complement(busy, start, end)
        t.idle = iv.total(gaps)
        t.idle_by_cause = idle.causes(gaps)
        for (label, axis), own in groups.items():
            ns = inside(own)
            if ns:
                t.by_group[label] = t.by_group.get(label, 0) + ns
                t.by_axis[axis] = t.by_axis.get(axis, 0) + ns
        return t

    steps: list[Step] = find_steps(trace, launches)
    return Breakdown(
        terms(low, high, None), [terms(s.start, s.end, s.number) for s in steps if s.end > s.start]
    )


def _exposed_by_group(trace: RankTrace, kinds: Ints, compute: Spans) -> dict[tuple[str, str], Spans]:
    """Disjoint sets; where groups communicate at once the instant goes to the one that began it first."""
    device = trace.device
    mine = np.flatnonzero(kinds == COMM)
    labels = [comm_group(trace, i) for i in range(len(trace.comm_meta))]
    of = {m: (labels[m] if m >= 0 else ("unknown", "unknown")) for m in iv.distinct(device.comm[mine]).tolist()}
    members: dict[tuple[str, str], list[Ints]] = {}
    for m, label in of.items():
        members.setdefault(label, []).append(mine[device.comm[mine] == m])
    out: dict[tuple[str, str], Spans] = {}
    taken = compute
    firsts = {label: int(device.start[np.concatenate(parts)].min()) for label, parts in members.items()}
    for label in sorted(members, key=lambda k: (firsts[k], k)):
        index = np.concatenate(members[label])
        own = iv.union(device.start[index], device.end[index])
        out[label] = iv.subtract(own, taken)
        taken = iv.merge(taken, own)
    return out


def recomputed(
    trace: RankTrace, kinds: Ints, launches: Launches
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Compute launched while a checkpoint's ``recompute_fn`` frame (or a ``recompute`` annotation) was open."""
    notes = trace.notes
    names = np.array(["recompute_fn" in n or n == "recompute" for n in trace.names], bool)
    chosen = np.flatnonzero(names[notes.name]) if len(notes) else np.zeros(0, np.int64)
    if not chosen.size:
        return np.zeros(len(trace.device), bool)
    inside = inside_calls(notes, chosen, launches.start, launches.thread)
    return np.asarray(inside & (kinds <= COMPUTE) & (launches.index >= 0))
