"""What a step's time is cut by: phases, collectives, stalls, as context managers.

Dozens are entered a layer, so the hot methods are written out rather than call each other. They read ``claimed_ns``
before the clock: garbage collection can strike behind a call, and what it takes has been claimed by the time the next
line runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainsys.telemetry.step_clock import Counts, StepClock
    from trainsys.telemetry.timer import DeviceTrack

STALL = "stall/"
MAX_SAMPLES = 256


def _say_where(error: BaseException, name: str) -> None:
    """The innermost phase that ``error`` left, for who tells of it."""
    if not any(note.startswith("during ") for note in getattr(error, "__notes__", ())):
        error.add_note(f"during {name}")


class Phase:
    """A reusable context manager. It holds no state of a call, so one object a name serves any nesting."""

    __slots__ = ("_clock", "calls_us", "name", "ns")

    def __init__(self, clock: StepClock, name: str, sampled: bool) -> None:
        self._clock, self.name = clock, name
        self.ns = 0
        """In the step under way."""
        self.calls_us: list[int] | None = [] if sampled else None

    def __enter__(self) -> None:
        c = self._clock
        c.open.append(self)
        if c.device is not None:
            c.enter_device(self.name)
        claimed = c.claimed_ns
        c.begun.append(c.now() - claimed)

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if error is not None:
            _say_where(error, self.name)
        c = self._clock
        claimed = c.claimed_ns
        own = c.now() - claimed - c.begun.pop()
        self.ns += own
        c.claimed_ns += own
        c.open.pop()
        if self.calls_us is not None and len(self.calls_us) < MAX_SAMPLES:
            self.calls_us.append(own // 1000)
        if c.device is not None:
            c.leave_device()


class Total:
    """One operation on one axis within the step under way."""

    __slots__ = ("calls", "nbytes", "ns")

    def __init__(self) -> None:
        self.calls = self.nbytes = self.ns = 0


class Collective:
    """The hottest of all, dozens a layer: made once for (axis, operation, bytes). It must not be entered within
    itself."""

    __slots__ = ("_began", "_clock", "_nbytes", "_total")

    def __init__(self, clock: StepClock, total: Total, nbytes: int) -> None:
        self._clock, self._total, self._nbytes = clock, total, nbytes
        self._began = 0

    def __enter__(self) -> None:
        c = self._clock
        claimed = c.claimed_ns
        self._began = c.now() - claimed

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        c, total = self._clock, self._total
        claimed = c.claimed_ns
        own = c.now() - claimed - self._began
        c.claimed_ns += own
        total.ns += own
        total.calls += 1
        total.nbytes += self._nbytes


class MarkedCollective(Collective):
    """The same where a device is marked too, if the collective is launched, or waited for, on its compute stream."""

    __slots__ = ("_device", "_marked", "_name")

    def __init__(self, clock: StepClock, total: Total, nbytes: int, name: str, device: DeviceTrack) -> None:
        super().__init__(clock, total, nbytes)
        self._name, self._device = name, device
        self._marked = False

    def __enter__(self) -> None:
        self._marked = self._device.marks()
        if self._marked:
            self._clock.enter_device(self._name)
        super().__enter__()

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        super().__exit__(kind, error, tb)
        if self._marked:
            self._clock.leave_device()


class DeviceWait:
    """The compute stream's wait for another stream: of the device alone, for the host does not wait."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: StepClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.enter_device(self._name)

    def __exit__(self, kind: object, error: object, tb: object) -> None:
        self._clock.leave_device()


class Pause:
    """Within it all time is the stall's: what phases and collectives inside it counted is taken back at its end.
    ``ended`` gets (kind, began, nanoseconds, detail) of a stall that is in no other."""

    __slots__ = ("_before", "_clock", "_detail", "_ended", "_kind", "_t0")

    def __init__(
        self, clock: StepClock, kind: str, detail: str, ended: Callable[[str, int, int, str], None]
    ) -> None:
        self._clock, self._kind, self._detail, self._ended = clock, kind, detail, ended
        self._t0 = 0
        self._before: Counts | None = None

    def __enter__(self) -> None:
        c = self._clock
        if c.device is not None:
            c.enter_device(STALL + self._kind)
        c.stall_depth += 1
        if c.stall_depth == 1:
            self._before = c.counts()
            self._t0 = c.now()

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if error is not None:
            _say_where(error, self._kind)
        c = self._clock
        c.stall_depth -= 1
        if c.device is not None:
            c.leave_device()
        if self._before is None:
            return
        ns = c.now() - self._t0
        c.restore(self._before)
        c.claimed_ns += ns
        c.stalls[self._kind] = c.stalls.get(self._kind, 0) + ns
        self._ended(self._kind, self._t0, ns, self._detail)
