"""Counts what a step asks of a device's streams and events, on the virtual device of `support.streams`.

Of `torch.cuda` a product sees only what that device offers, so what is counted is all it would call. What the stand-in
does for itself, collectives and their streams, is not counted.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

from support import streams
from trainsys.config.run import RunConfig
from trainsys.dryrun.swap import swapped
from trainsys.telemetry.recorder import Recorder
from trainsys.train.device import CudaTimer

calls: Counter[str] = Counter()
"""Since the last step ended."""


class SpiedEvent(streams.Event):
    """``timed`` events are the recorder's marks; others order streams."""

    def __init__(self, *args: Any, enable_timing: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = "mark" if enable_timing else "event"
        calls[f"{self.kind} made"] += 1

    def record(self, stream: Any = None) -> None:
        calls[f"{self.kind} recorded"] += 1
        super().record(stream)

    def wait(self, stream: Any = None) -> None:
        calls[f"{self.kind} waited for"] += 1
        super().wait(stream)

    def query(self) -> bool:
        calls[f"{self.kind} queried"] += 1
        return super().query()

    def elapsed_time(self, other: streams.Event) -> float:
        calls[f"{self.kind} read"] += 1
        return super().elapsed_time(other)

    def synchronize(self) -> None:
        calls[f"{self.kind} synchronised"] += 1


class SpiedStream(streams.Stream):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        calls["stream made"] += 1

    def record_event(self, event: Any = None) -> Any:
        return super().record_event(event or SpiedEvent())

    def synchronize(self) -> None:
        calls["stream synchronised"] += 1


def calls_by_step(cfg: RunConfig, world: int, steps: int) -> list[dict[str, int]]:
    """What each of the first ``steps`` steps of rank 0 calls; in a process without a process group."""
    found: list[dict[str, int]] = []
    end_step = Recorder.end_step

    def ended(self: Recorder, *args: Any, **kwargs: Any) -> Any:
        record = end_step(self, *args, **kwargs)
        found.append(dict(calls))
        calls.clear()
        return record

    with ExitStack() as stack:
        stack.enter_context(swapped(streams.Device, "Event", SpiedEvent))
        stack.enter_context(swapped(streams.Device, "Stream", SpiedStream))
        # The product's own, which uses marks again.
        stack.enter_context(swapped(streams, "Timer", CudaTimer))
        stack.enter_context(swapped(Recorder, "end_step", ended))
        calls.clear()
        streams.play(cfg, world, 0, [100e9] * (steps - 1))
    return found
