"""What a sink is, and the fan-out that keeps a bad one from hurting the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainsys.telemetry.events import Finding

QUEUE = 512
"""Steps a sink may lag before it loses some."""

CONSOLE_S = 1.0
"""Seconds that the console may take at the end even where another sink used up all the time."""


@dataclass(frozen=True)
class RunInfo:
    """What a sink may want to know at the start."""

    name: str
    run_id: str
    """This attempt's."""
    run_dir: Path
    steps: int
    first_step: int = 0
    world: int = 1
    layout: str = ""
    """Axes of more than one rank in words, e.g. ``dp_shard=2 × tp=2``."""
    model: str = ""
    hardware: str = ""
    peak_label: str = ""
    """What MFU is a share of, e.g. ``measured 92 GFLOP/s``; empty: unknown, there is no MFU."""
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    pid: int | None = None
    """The training process's, where that is another one."""
    lineage: str = ""
    """The run's over all attempts: what a sink that can go on with an earlier attempt's record goes by."""


class Sink(Protocol):
    """Called from one thread of its own, in this order: start, then step and message in any mixture,
    finish."""

    name: str

    def start(self, info: RunInfo) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """``metrics`` as ``telemetry.metrics.step_metrics`` names them."""
        ...

    def finding(self, finding: Finding) -> None:
        """News of who or what holds all ranks up."""
        ...

    def message(self, level: str, text: str) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class _Lane:
    """One sink, its queue and its thread."""

    def __init__(self, sink: Sink, warn: Callable[[str], None], depth: int) -> None:
        self.sink = sink
        self.dropped = 0
        self.failed = False
        self._warn = warn
        self._depth = depth
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"trainsys-sink-{sink.name}", daemon=True)
        self.thread.start()

    def send(self, method: str, *args: Any, always: bool = False) -> None:
        if self.failed:
            return
        if not always and self._calls.qsize() >= self._depth:
            self.dropped += 1
            return
        self._calls.put((method, args))

    def close(self, summary: Mapping[str, Any]) -> None:
        self.send("finish", summary, always=True)
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.failed:
                continue
            method, args = call
            try:
                getattr(self.sink, method)(*args)
            except Exception as error:
                self.failed = True
                self._warn(
                    f"{self.sink.name} is off for the rest of the run: {method} failed: "
                    f"{type(error).__name__}: {_one_line(error)}"
                )


class Sinks:
    """All sinks of a run, on rank 0. Every method returns at once; only ``finish`` waits, and not for long.

    Each sink has a thread and a bounded queue: one that lags loses steps (told at the end, by count), one
    that raises is off for the rest of the run with a single warning, one that hangs is left behind.

    Arguments:
        warn: takes one line of text; called from sink threads.
    """

    def __init__(self, sinks: Sequence[Sink], warn: Callable[[str], None], depth: int = QUEUE) -> None:
        self._warn = warn
        self._lanes = [_Lane(sink, warn, depth) for sink in sinks]

    def start(self, info: RunInfo) -> None:
        for lane in self._lanes:
            lane.send("start", info, always=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """``metrics`` must not be changed afterwards."""
        for lane in self._lanes:
            lane.send("step", step, metrics)

    def extra(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics beside those of ``step``, of an earlier step at times: for sinks that plot, not for those that
        write a line a step."""
        for lane in self._lanes:
            if lane.sink.name not in ("console", "metrics.jsonl"):
                lane.send("step", step, metrics)

    def finding(self, finding: Finding) -> None:
        for lane in self._lanes:
            lane.send("finding", finding, always=True)

    def message(self, level: str, text: str) -> None:
        for lane in self._lanes:
            lane.send("message", level, text)

    def finish(self, summary: Mapping[str, Any], timeout_s: float = 25.0) -> None:
        """Ends every sink; after ``timeout_s`` over all of them, goes on without those that still hang."""
        deadline = time.monotonic() + timeout_s
        # The console ends last, so that it can still show what there is to say about the others.
        consoles = [lane for lane in self._lanes if lane.sink.name == "console"]
        for lanes in ([lane for lane in self._lanes if lane not in consoles], consoles):
            for lane in lanes:
                lane.close(summary)
            for lane in lanes:
                least = CONSOLE_S if lane in consoles else 0.0
                lane.thread.join(max(least, deadline - time.monotonic()))
                if lane.thread.is_alive():
                    self._warn(f"{lane.sink.name} did not finish within {timeout_s:.0f} s: left behind")
                elif lane.dropped:
                    self._warn(f"{lane.sink.name} could not keep up: {lane.dropped} steps are missing there")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
