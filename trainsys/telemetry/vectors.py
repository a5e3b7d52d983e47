"""A step as a row of float64, so that a window of all ranks is one small gather and one matrix ``[R, V]``."""

from __future__ import annotations

import math

from trainsys.telemetry.events import COMM, COMM_AXES, PHASES, HostTime, Memory, Step

BYTES = "bytes/"
HOST = tuple(HostTime.__struct_fields__)
"""Counters since the process began; the latest reading."""
TIMED = (*PHASES, *(COMM + axis for axis in COMM_AXES))
_SCALARS = (
    "step", "step_time_s", "stalls_s", "tokens", "tokens_padded", "attn_pairs", "loss", "grad_norm", "lr",
    "allocated", "reserved", "peak", "rss", *HOST,
)  # fmt: skip
VECTOR: tuple[str, ...] = (*_SCALARS, *TIMED, *(BYTES + axis for axis in COMM_AXES))
"""The documented order: scalars, seconds by phase, bytes by axis."""
PLACE = {name: i for i, name in enumerate(VECTOR)}
_OTHER, _UNKNOWN, _UNKNOWN_BYTES = PLACE["other"], PLACE[f"{COMM}unknown"], PLACE[f"{BYTES}unknown"]
_NOTHING = [0.0] * (len(VECTOR) - len(_SCALARS))
_NO_MEMORY, _NO_HOST = Memory(), HostTime()


def to_vector(step: Step) -> list[float]:
    """``step`` in the order of ``VECTOR``; None becomes nan.

    Phases and axes with no place of their own are added to ``other`` and ``unknown``, so the phases still sum to
    the step time.
    """
    memory, stalls, host = step.memory or _NO_MEMORY, step.stalls, step.host or _NO_HOST
    nan = math.nan
    out = [
        step.step, step.step_time_s, sum(stalls.values()) if stalls else 0.0,
        step.tokens, step.tokens_padded, step.attn_pairs,
        nan if step.loss is None else step.loss,
        nan if step.grad_norm is None else step.grad_norm,
        nan if step.lr is None else step.lr,
        memory.allocated, memory.reserved, memory.peak, memory.rss,
        host.cpu_s, host.wait_s, host.others_s, host.throttled_s, host.faults, host.major_faults,
        *_NOTHING,
    ]  # fmt: skip
    place = PLACE.get
    for name, s in step.phases.items():
        at = place(name)
        out[(_UNKNOWN if name.startswith(COMM) else _OTHER) if at is None else at] += s
    for axis, ops in step.comm.items():
        at = place(BYTES + axis, _UNKNOWN_BYTES)
        for c in ops.values():
            out[at] += c.bytes
    return out
