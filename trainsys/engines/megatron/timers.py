"""Megatron-Core's own timing hooks, answered by our recorder: its schedules say what they are doing."""

from __future__ import annotations

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
        self._recorder, self._phase = recorder, phase

    def start(self, barrier: bool = False) -> None:
        self._recorder.phase(self._phase).__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._recorder.phase(self._phase).__exit__(None, None, None)


class _Nothing:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


class PhaseTimers:
    """What a Megatron config holds as ``timers``."""

    def __init__(self, recorder: Recorder) -> None:
        self._timers: dict[str, Any] = {name: _Timer(recorder, phase) for name, phase in _PHASES.items()}
        self._nothing = _Nothing()

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return self._timers.get(name, self._nothing)
