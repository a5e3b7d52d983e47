"""What of a step is kept on file: times to the microsecond or to one part in eight thousand, whichever is coarser.

A step's own time and start are whole microseconds, and its phases sum to it: ``other`` takes what rounding moves. A
single call of a phase is kept to one part in 512. Where a step has many (micro-batches times virtual stages) those of
every second, third, ... step are kept, so that there are ``CALLS`` per step: medians and correlations over a run do not
notice.
"""

from __future__ import annotations

import msgspec

from trainsys.telemetry.events import COMM, Comm, DeviceStep, Event, RunStart, Step

FINE = 13
"""Significant bits of a time."""
COARSE = 9
"""Significant bits of a single call of a phase."""
ROUNDED = 2
"""Microseconds between a step's end and the next one's start that are rounding."""
CALLS = 16
"""Single calls kept per step, on average, once ``ALL_CALLS`` steps have had all of theirs."""
ALL_CALLS = 256


class Resolution:
    """``kept`` of every record of one rank, in order."""

    def __init__(self, info: RunStart) -> None:
        self._peak, self._world = info.peak_flops, info.world
        self._steps = self._ended = 0

    def kept(self, event: Event) -> Event:
        if isinstance(event, Step):
            return self._step(event)
        if isinstance(event, DeviceStep):
            phases = {name: significant(round(1e6 * s), FINE) for name, s in event.phases.items()}
            return DeviceStep(
                step=event.step, step_time_s=sum(phases.values()) / 1e6,
                phases={name: us / 1e6 for name, us in phases.items()},
            )  # fmt: skip
        return event

    def _step(self, step: Step) -> Step:
        stalls = {kind: round(1e6 * s) for kind, s in step.stalls.items()}
        began = round(1e6 * step.start_s)
        if abs(began - self._ended) <= ROUNDED:  # where the one before ended: the times of steps add up, however many
            began = self._ended
        self._ended = round(1e6 * (step.start_s + step.step_time_s + sum(step.stalls.values())))
        step_us = self._ended - began - sum(stalls.values())
        phases: dict[str, int] = {}
        comm: dict[str, dict[str, Comm]] = {}
        for name, s in step.phases.items():
            if name != "other":
                phases[name] = significant(round(1e6 * s), FINE)
        for axis, ops in step.comm.items():
            blocked = {op: significant(round(1e6 * c.blocked_s), FINE) for op, c in ops.items()}
            comm[axis] = {op: Comm(c.calls, c.bytes, blocked[op] / 1e6) for op, c in ops.items()}
            if COMM + axis in phases:
                phases[COMM + axis] = sum(blocked.values())
        rest = step_us - sum(phases.values())
        if rest < 0 and phases:
            longest = max(phases, key=phases.__getitem__)
            phases[longest], rest = phases[longest] + rest, 0
        if "other" in step.phases or rest:
            phases["other"] = rest
        out = msgspec.structs.replace(
            step, start_s=began / 1e6, step_time_s=step_us / 1e6, comm=comm,
            phases={name: us / 1e6 for name, us in phases.items()},
            stalls={kind: us / 1e6 for kind, us in stalls.items()},
            micro_us=self._calls(step),
        )  # fmt: skip
        flops = step.flops
        if step.mfu is not None and flops is not None and self._peak and step_us > 0:
            possible = out.step_time_s * self._peak * self._world
            out.mfu = flops.model / possible
            out.mfu_palm = None if flops.palm is None else flops.palm / possible
            out.hfu = None if flops.hardware is None else flops.hardware / possible
        self._steps += 1
        return out

    def _calls(self, step: Step) -> dict[str, list[int]]:
        every = -(-sum(map(len, step.micro_us.values())) // CALLS)
        if self._steps >= ALL_CALLS and every > 1 and step.step % every:
            return {}
        return {name: [significant(us, COARSE) for us in calls] for name, calls in step.micro_us.items()}


def significant(value: int, bits: int) -> int:
    """``value`` (>= 0) rounded to so many significant bits."""
    away = value.bit_length() - bits
    return value if away <= 0 else (value + (1 << away >> 1)) >> away << away
