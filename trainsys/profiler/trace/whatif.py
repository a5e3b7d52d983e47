"""How long the trace had been with one thing ideal, where its records can tell.

Two things are asked of an answer. What the host or the loader would save cannot exceed the time that the device was
idle. And where the host did nothing that is recorded while the device worked on, it may have been busy or waiting: the
trace is replayed under both assumptions, and if it matters which is true, the answer is withheld.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainsys.profiler.trace.classify import COMM, COMPUTE, COPY, MATMUL
from trainsys.profiler.trace.graph import HOST, SYNCED, Graph
from trainsys.profiler.trace.intervals import Ints, distinct
from trainsys.profiler.trace.replay import Changed, Replay

_SMALL, _CLOSE = 0.005, 0.1
"""Two answers are one where they differ by less than this share of the span, or of the larger."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """``saved_share`` of the span had ``what`` been so."""

    what: str
    span_ns: int
    saved_ns: int
    saved_share: float


def questions(g: Graph, waits: Ints | None) -> dict[str, tuple[Changed, bool]]:
    """What applies to this trace: the change, and whether it is the host's or the loader's."""
    kinds = set(distinct(g.kind).tolist())
    out: dict[str, tuple[Changed, bool]] = {}
    if COMM in kinds:
        out["communication took no time"] = (Changed({COMM: 0.0}), False)
    if waits is not None:
        out["no waiting for other ranks in collectives"] = (Changed(shorter=waits), False)
    if COPY in kinds:
        out["copies took no time"] = (Changed({COPY: 0.0}), False)
    if (g.data != 0).any():
        out["the data loader never made anyone wait"] = (Changed(loader=False), True)
    if (g.held_by >= 0).any() or g.blocked.node.size:
        out["the host never waited for the device"] = (Changed(waits=False), True)
    if HOST in kinds or SYNCED in kinds:
        out["the host were twice as fast"] = (Changed({HOST: 0.5}), True)
    out["matmuls were 20% faster"] = (Changed({MATMUL: 5 / 6}), False)
    out["other kernels took half the time (fusion)"] = (Changed({COMPUTE: 0.5}), False)
    return out


def what_ifs(again: Replay, idle: int, waits: Ints | None) -> tuple[list[WhatIf], dict[str, str]]:
    """(answers, the largest saving first; what is withheld, and why). ``idle``: ns that the device was idle.

    ``waits``: ns that each node waited for other ranks, if known.
    """
    g = again.graph
    device = np.flatnonzero(g.kind < HOST)
    span = int(g.end[device].max() - g.start[device].min())
    doubtful = not g.sure.all()
    given: list[WhatIf] = []
    withheld: dict[str, str] = {}
    for what, (changed, on_host) in questions(g, waits).items():
        saved = span - _span(again, device, changed)
        if doubtful:
            other = span - _span(again, device, replace(changed, trust=False))
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


def _span(again: Replay, device: Ints, changed: Changed) -> int:
    end = again.ends(changed)
    first = device[:_FIRST]
    begins = end[first] - again.length(changed)[first]
    return int(end[device].max() - begins.min())


_FIRST = 64
"""The earliest start is among the first activities, whatever changed."""
