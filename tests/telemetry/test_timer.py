"""Device marks become seconds without anyone waiting, and a device that never answers costs no memory."""

from typing import Any

import pytest

from trainsys.telemetry.timer import DeviceTrack, HostTimer


class Never:
    """A device that hangs."""

    def __init__(self) -> None:
        self.made = 0
        self.free: list[Any] = []

    def mark(self) -> int:
        self.made += 1
        return self.made

    def elapsed(self, first: Any, last: Any) -> float | None:
        return None

    def marks(self, stream: Any) -> bool:
        return True

    def recycle(self, handles: Any) -> None:
        self.free += handles


def test_a_device_that_never_answers_is_given_up() -> None:
    timer = Never()
    track = DeviceTrack(timer, depth=3)
    track.restart("other")
    for i in range(10):
        track.mark("forward")
        assert track.end_step(i, "other") == []
    assert track.given_up == 7
    assert len(set(timer.free)) == len(timer.free)  # no handle is given back twice
    # Still held: three steps of two marks each, and the one that opens the next step.
    assert timer.made - len(timer.free) == 3 * 2 + 1


def test_host_timer_resolves_at_once_and_sums() -> None:
    timer = HostTimer()
    track = DeviceTrack(timer)
    track.restart("other")
    first = track._open.marks[0]
    track.mark("forward")
    ((step, seconds),) = track.end_step(0, "other")
    assert step == 0
    assert sum(seconds.values()) == pytest.approx(timer.elapsed(first, track._open.marks[0]))
