"""How long the trace had been with one thing ideal, where its records can tell.

Two things are asked of an answer. What the host or the loader would save cannot exceed the time that the device was
idle. And where the host did nothing that is recorded while the device worked on, it may have been busy or waiting: the
trace is replayed under both assumptions, and if it matters which is true, the answer is withheld.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainsys.profiler.trace.classify import COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.graph import HOST, SYNCED, Graph
from trainsys.profiler.trace.replay import Changed, replay

_SMALL, _CLOSE = 0.005, 0.1
"""Two answers are one where they differ by less than this share of the span, or of the larger."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """``saved_share`` of the span had ``what`` been so."""

    what: str
    span_ns: int
    saved_ns: int
    saved_share: float


def questions(g: Graph, waits: list[int] | None) -> dict[str, tuple[Changed, bool]]:
    """What applies to this trace: the change, and whether it is the host's or the loader's."""
    kinds = set(g.kind)
    out: dict[str, tuple[Changed, bool]] = {}
    if COMM in kinds:
        out["communication took no time"] = (Changed({COMM: 0.0}), False)
    if waits is not None:
        out["no waiting for other ranks in collectives"] = (Changed(shorter=waits), False)
    if COPY in kinds:
        out["copies took no time"] = (Changed({COPY: 0.0}), False)
    if any(a.data for a in g.after):
        out["the data loader never made anyone wait"] = (Changed(loader=False), True)
    if any(a.held_by >= 0 for a in g.after) or any(g.blocked):
        out["the host never waited for the device"] = (Changed(waits=False), True)
    if HOST in kinds or SYNCED in kinds:
        out["the host were twice as fast"] = (Changed({HOST: 0.5}), True)
    out["matmuls were 20% faster"] = (Changed({MATMUL: 5 / 6}), False)
    out["other kernels took half the time (fusion)"] = (Changed({COMPUTE: 0.5}), False)
    return out


def what_ifs(g: Graph, idle: int, waits: list[int] | None) -> tuple[list[WhatIf], dict[str, str]]:
    """(answers, the largest saving first; what is withheld, and why). ``idle``: ns that the device was idle.

    ``waits``: ns that each node waited for other ranks, if known.
    """
    device = [i for i, k in enumerate(g.kind) if k < HOST]
    span = max(g.end[i] for i in device) - min(g.start[i] for i in device)
    doubtful = not all(a.sure for a in g.after)
    given: list[WhatIf] = []
    withheld: dict[str, str] = {}
    for what, (changed, on_host) in questions(g, waits).items():
        saved = span - _span(g, device, changed)
        if doubtful:
            other = span - _span(g, device, replace(changed, trust=False))
            if abs(saved - other) > max(_SMALL * span, _CLOSE * max(abs(saved), abs(other))):
                low, high = sorted((saved, other))
                withheld[what] = (
                    f"{low / span:.1%} or {high / span:.1%} less: the trace does not tell whether the host was busy or "
                    "waiting while the device worked"
                )
                continue
        if on_host and saved > idle + _SMALL * span:
            withheld[what] = (
                f"{saved / span:.1%} less by replay, but the device was idle for {idle / span:.1%} only"
            )
            continue
        given.append(WhatIf(what, span - saved, saved, round(saved / span, 5) if span else 0.0))
    return sorted(given, key=lambda w: -w.saved_ns), withheld


def _span(g: Graph, device: list[int], changed: Changed) -> int:
    end = replay(g, changed)
    shorter, factor = changed.shorter, changed.factor
    begins = []
    for i in device[:_FIRST]:
        length = max(0, g.length[i] - (shorter[i] if shorter else 0))
        begins.append(end[i] - round(length * factor.get(g.kind[i], 1.0)))
    return max(end[i] for i in device) - min(begins)


_FIRST = 64
"""The earliest start is among the first activities, whatever changed."""
