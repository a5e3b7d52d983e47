"""Time on a device that runs behind the host, read back without ever waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol


class Timer(Protocol):
    """Marks on a device's compute stream. On CUDA an ``Event.record()``; the engine brings that one."""

    def mark(self) -> Any:
        """A handle for "everything queued on the compute stream up to now". Must not synchronise."""
        ...

    def elapsed(self, first: Any, last: Any) -> float | None:
        """Seconds between two marks, or None while the device has not reached ``last``. Must not wait."""
        ...

    def recycle(self, handles: Sequence[Any]) -> None:
        """These handles are done with and may be reused for later marks."""
        ...

    def marks(self, stream: Any) -> bool:
        """Whether ``stream`` (None: the current one) is the stream that is marked. What other streams are given to
        do, or wait for, is no time of the step."""
        ...


class HostTimer:
    """The CPU's: nothing runs behind, so a mark is a time. It shows what a ``Timer`` must do, and tests use
    it."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def elapsed(self, first: int, last: int) -> float | None:
        return (last - first) / 1e9

    def recycle(self, handles: Sequence[int]) -> None:
        pass

    def marks(self, stream: Any) -> bool:
        return True


class MarkedStep:
    """The marks of one step: ``names[i]`` is what ran from ``marks[i]`` to ``marks[i + 1]``."""

    __slots__ = ("marks", "names", "step")

    def __init__(self) -> None:
        self.step = -1
        self.marks: list[Any] = []
        self.names: list[str] = []


class DeviceTrack:
    """Turns marks into seconds by phase, some steps later.

    At most ``depth`` steps wait for the device; an older one is given up (``given_up`` counts) rather than
    waited for, so memory stays fixed even if a device never answers.
    """

    def __init__(self, timer: Timer, depth: int = 8) -> None:
        self.given_up = 0
        self._timer = timer
        self._depth = depth
        self._open = MarkedStep()
        self._pending: deque[MarkedStep] = deque()

    def marks(self, stream: Any = None) -> bool:
        """Whether ``stream`` (None: the current one) is the one that is marked."""
        return self._timer.marks(stream)

    def mark(self, name: str) -> None:
        """From here on the stream works for ``name``."""
        self._open.marks.append(self._timer.mark())
        self._open.names.append(name)

    def restart(self, name: str) -> None:
        """Forgets the marks of the step under way; it begins here."""
        self._timer.recycle(self._open.marks)
        self._open = MarkedStep()
        self.mark(name)

    def end_step(self, step: int, name: str) -> list[tuple[int, dict[str, float]]]:
        """Closes ``step``, opens the next one in phase ``name``; returns the earlier steps the device has
        finished."""
        self.mark(name)
        done, self._open = self._open, MarkedStep()
        done.step = step
        # The closing mark opens the next step too, so no time falls between steps.
        self._open.marks.append(done.marks[-1])
        self._open.names.append(name)
        self._pending.append(done)
        return self.resolve()

    def resolve(self) -> list[tuple[int, dict[str, float]]]:
        """``(step, {phase: seconds})`` of each pending step that the device has finished, oldest first."""
        ready = []
        while self._pending:
            head = self._pending[0]
            if self._timer.elapsed(head.marks[0], head.marks[-1]) is not None:
                ready.append((head.step, self._seconds(head)))
            elif len(self._pending) > self._depth:
                self.given_up += 1
            else:
                break
            self._pending.popleft()
            # The last mark is the next step's first.
            self._timer.recycle(head.marks[:-1])
        return ready

    def _seconds(self, marked: MarkedStep) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for i, name in enumerate(marked.names[:-1]):
            span = self._timer.elapsed(marked.marks[i], marked.marks[i + 1])
            seconds[name] = seconds.get(name, 0.0) + (span or 0.0)
        return seconds
