"""Counts what a step asks of a device's streams and events, on the virtual device of `support.virtual`.

Of `torch.cuda` a product sees only what that device offers, so what is counted is all it would call. What the stand-in
does for itself, collectives and their streams, is not counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from support.virtual.device import Device, Event, Stream
from support.virtual.record import record
from trainsys.config.run import RunConfig
from trainsys.dryrun.swap import swapped
from trainsys.telemetry.recorder import Recorder


class SpiedDevice(Device):
    """Whose kernels are done at once, so that marks may be used again; ``calls`` since the last step ended."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__()

    def Stream(self, *_: Any, **__: Any) -> Stream:
        self.calls["stream made"] += 1
        return SpiedStream(self)

    def Event(self, *_: Any, enable_timing: bool = False, **__: Any) -> Event:
        return SpiedEvent(self, "mark" if enable_timing else "event")

    def synchronize(self, *_: Any) -> None:
        self.calls["device synchronised"] += 1


class SpiedEvent(Event):
    """``kind``: a ``mark`` is timed, one of the recorder's; an ``event`` orders streams."""

    def __init__(self, device: SpiedDevice, kind: str) -> None:
        super().__init__(device)
        self.kind, self.calls = kind, device.calls
        self.calls[f"{kind} made"] += 1

    def record(self, stream: Any = None) -> None:
        self.calls[f"{self.kind} recorded"] += 1
        super().record(stream)

    def wait(self, stream: Any = None) -> None:
        self.calls[f"{self.kind} waited for"] += 1
        super().wait(stream)

    def query(self) -> bool:
        self.calls[f"{self.kind} queried"] += 1
        return True

    def elapsed_time(self, other: Event) -> float:
        self.calls[f"{self.kind} read"] += 1
        return 1.0

    def synchronize(self) -> None:
        self.calls[f"{self.kind} synchronised"] += 1


class SpiedStream(Stream):
    def __init__(self, device: SpiedDevice) -> None:
        super().__init__(device)
        self.calls = device.calls

    def record_event(self, event: Any = None) -> Any:
        return super().record_event(event or self._device.Event())

    def synchronize(self) -> None:
        self.calls["stream synchronised"] += 1


def calls_by_step(cfg: RunConfig, world: int, steps: int) -> list[dict[str, int]]:
    """What each of the first ``steps`` steps of rank 0 calls; in a process without a process group."""
    found: list[dict[str, int]] = []
    device, end_step = SpiedDevice(), Recorder.end_step

    def ended(self: Recorder, *args: Any, **kwargs: Any) -> Any:
        step = end_step(self, *args, **kwargs)
        found.append(dict(device.calls))
        device.calls.clear()
        return step

    with swapped(Recorder, "end_step", ended):
        record(cfg, world, 0, device, steps)
    return found
