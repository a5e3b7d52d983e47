"""Time and memory as a CUDA device tells them, never waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainsys.telemetry.events import Memory
from trainsys.telemetry.recorder import host_memory


class CudaTimer:
    """Marks are CUDA events on the compute stream, whatever stream is current at the time: it is the one that is
    current when this is made. See :class:`trainsys.telemetry.timer.Timer`.

    ``device``: ``torch.cuda``, or what has streams and events as it does.
    """

    def __init__(self, device: Any = torch.cuda) -> None:
        self._device, self._stream = device, device.current_stream()
        self._free: list[Any] = []

    def mark(self) -> Any:
        event = self._free.pop() if self._free else self._device.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def elapsed(self, first: Any, last: Any) -> float | None:
        return first.elapsed_time(last) / 1e3 if last.query() else None

    def recycle(self, handles: Sequence[Any]) -> None:
        self._free.extend(handles)

    def marks(self, stream: Any) -> bool:
        return bool((self._device.current_stream() if stream is None else stream) == self._stream)


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
