"""Whose a step's time is: the accounting under the recorder, about a microsecond a collective.

Every span counts what it has for *itself*: its length, less what spans within it have claimed. ``claimed_ns`` is what
all spans since the step began have claimed together, so what a span has for itself is its length on the clock "time
less claimed", and no totals have to be kept by nesting. What nobody claimed is the step's ``other``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainsys.telemetry.events import COMM
from trainsys.telemetry.spans import Collective, DeviceWait, MarkedCollective, Phase, Total
from trainsys.telemetry.timer import DeviceTrack

OTHER = "other"
_NOTHING = nullcontext()


@dataclass(frozen=True)
class Counts:
    """All that a stall takes back."""

    claimed_ns: int
    gc_ns: int
    phases: dict[str, tuple[int, int]]
    totals: dict[tuple[str, str], tuple[int, int, int]]


@dataclass
class StepTimes:
    """A step that is over; nanoseconds. ``phases`` (with ``gc`` and ``other``) and ``totals`` sum to ``step_ns``."""

    began: int
    step_ns: int
    phases: dict[str, int]
    totals: dict[tuple[str, str], tuple[int, int, int]]
    """(axis, operation) -> calls, bytes, nanoseconds."""
    stalls: dict[str, int]
    calls_us: dict[str, list[int]]
    """Microseconds of each call, for sampled phases that had more than one."""


class StepClock:
    """The step under way.

    ``now``: nanoseconds of a monotonic clock; ``began``: its reading when the first step began; ``sampled``: phases
    whose single calls are kept; ``device``: what is marked at every transition, None on CPU.
    """

    def __init__(
        self, now: Callable[[], int], began: int, sampled: tuple[str, ...] = (), device: DeviceTrack | None = None
    ) -> None:
        self.now, self.began, self.device = now, began, device
        self.open: list[Phase] = []
        self.begun: list[int] = []
        """When each open phase began, on the clock "time less claimed"."""
        self.claimed_ns = self.gc_ns = self.stall_depth = 0
        self.stalls: dict[str, int] = {}
        self._sampled = sampled
        self._phases: dict[str, Phase] = {}
        self._totals: dict[tuple[str, str], Total] = {}
        self._on_device = [OTHER]

    def phase(self, name: str) -> Phase:
        found = self._phases.get(name)
        if found is None:
            found = self._phases[name] = Phase(self, name, name in self._sampled)
        return found

    def collective(self, axis: str, op: str, nbytes: int) -> Collective:
        """For any number of calls, one after the other."""
        total = self.total(axis, op)
        if self.device is None:
            return Collective(self, total, nbytes)
        return MarkedCollective(self, total, nbytes, COMM + axis, self.device)

    def waiting(self, axis: str, stream: Any) -> AbstractContextManager[None]:
        """Around ``stream``'s wait for another one that communicates on ``axis``."""
        if self.device is None or not self.device.marks(stream):
            return _NOTHING
        return DeviceWait(self, COMM + axis)

    def total(self, axis: str, op: str) -> Total:
        found = self._totals.get((axis, op))
        if found is None:
            found = self._totals[axis, op] = Total()
        return found

    def take(self, ns: int) -> int:
        """Claims up to ``ns`` of what the phase under way has for itself in this call; how much that was."""
        ns = min(ns, self.now() - self.claimed_ns - (self.begun[-1] if self.begun else self.began))
        self.claimed_ns += ns
        return ns

    def collected(self, ns: int) -> None:
        """A garbage collection of ``ns`` has just ended."""
        self.gc_ns += ns
        self.claimed_ns += ns

    def enter_device(self, name: str) -> None:
        """From here on the device works for ``name``; within a stall all of its time is the stall's."""
        self._on_device.append(name)
        self._mark()

    def leave_device(self) -> None:
        self._on_device.pop()
        self._mark()

    def _mark(self) -> None:
        if self.device is not None and self.stall_depth == 0:
            self.device.mark(self._on_device[-1])

    @property
    def on_device(self) -> str:
        """What the device works for."""
        return self._on_device[-1]

    def counts(self) -> Counts:
        return Counts(
            self.claimed_ns,
            self.gc_ns,
            {name: (p.ns, len(p.calls_us or ())) for name, p in self._phases.items()},
            {key: (t.calls, t.nbytes, t.ns) for key, t in self._totals.items()},
        )

    def restore(self, before: Counts) -> None:
        self.claimed_ns, self.gc_ns = before.claimed_ns, before.gc_ns
        for name, phase in self._phases.items():
            phase.ns, samples = before.phases.get(name, (0, 0))
            if phase.calls_us is not None:
                del phase.calls_us[samples:]
        for key, t in self._totals.items():
            t.calls, t.nbytes, t.ns = before.totals.get(key, (0, 0, 0))

    def end(self, now: int) -> StepTimes:
        """Ends the step at ``now``. The next one begins there, and phases that are open go on in it."""
        for i in range(len(self.begun) - 1, -1, -1):
            own = now - self.claimed_ns - self.begun[i]
            self.open[i].ns += own
            self.claimed_ns += own
            self.begun[i] = now
        phases: dict[str, int] = {}
        calls: dict[str, list[int]] = {}
        totals: dict[tuple[str, str], tuple[int, int, int]] = {}
        for phase in self._phases.values():
            if phase.ns:
                phases[phase.name] = phase.ns
                phase.ns = 0
            if phase.calls_us:
                if len(phase.calls_us) > 1:
                    calls[phase.name] = phase.calls_us
                phase.calls_us = []
        if self.gc_ns:
            phases["gc"] = self.gc_ns
        for key, t in self._totals.items():
            if t.calls:
                totals[key] = t.calls, t.nbytes, t.ns
                t.calls = t.nbytes = t.ns = 0
        # Of the clock, so that the sum holds whatever was claimed.
        phases[OTHER] = now - self.began - self.claimed_ns
        step_ns = now - self.began - sum(self.stalls.values())
        out = StepTimes(self.began, step_ns, phases, totals, self.stalls, calls)
        self.began, self.claimed_ns, self.gc_ns, self.stalls = now, 0, 0, {}
        return out
