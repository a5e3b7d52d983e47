"""Time and memory as a CUDA device tells them, never waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainsys.telemetry.events import Memory
from trainsys.telemetry.recorder import host_memory


class CudaTimer:
    """Marks are CUDA events on the current (compute) stream; see :class:`trainsys.telemetry.timer.Timer`."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float | None:
        return first.elapsed_time(last) / 1e3 if last.query() else None

    def recycle(self, handles: Sequence[torch.cuda.Event]) -> None:
        self._free.extend(handles)


def cuda_memory() -> Memory:
    """Allocator figures of the current device in bytes; ``peak`` since the last call."""
    memory = Memory(
        allocated=torch.cuda.memory_allocated(),
        reserved=torch.cuda.memory_reserved(),
        peak=torch.cuda.max_memory_allocated(),
        rss=host_memory().rss,
    )
    torch.cuda.reset_peak_memory_stats()
    return memory
