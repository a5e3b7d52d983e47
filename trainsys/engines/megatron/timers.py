"""Megatron-Core's own timing hooks, answered by our recorder: its schedules say what they are doing."""

from __future__ import annotations

import time
from typing import Any

from trainsys.telemetry.recorder import Recorder

_PHASES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "backward",
    "non-tensor-parallel-grads-all-reduce": "backward",
    "embedding-grads-all-reduce": "backward",
}


class _Timer:
    def __init__(self, recorder: Recorder, phase: str) -> None:
        self._span = recorder.phase(phase)
        self._began = 0.0
        self.seconds = 0.0
        """Between all starts and stops so far, on the host's clock, what communicated inside included."""

    def start(self, barrier: bool = False) -> None:
        self._span.__enter__()
        self._began = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        self.seconds += time.perf_counter() - self._began
        self._span.__exit__(None, None, None)


class _Nothing:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


class PhaseTimers:
    """What a Megatron config holds as ``timers``."""

    def __init__(self, recorder: Recorder) -> None:
        self._timers: dict[str, Any] = {name: _Timer(recorder, phase) for name, phase in _PHASES.items()}
        self._nothing = _Nothing()

    def take_forward(self) -> float:
        """Seconds of forward since this was last asked."""
        timer = self._timers["forward-compute"]
        seconds, timer.seconds = timer.seconds, 0.0
        return float(seconds)

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return self._timers.get(name, self._nothing)
