"""A host that launches onto streams and at times waits for them, simulated in nanoseconds.

A program is a list of what the host does. The machine runs it and tells what a profiler would have recorded; the
same program run with a ``Change`` tells what the change is truly worth. All that is random was drawn when the program
was written, so two runs differ by the change alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MATMUL, COMPUTE, COMM, COPY = "matmul", "compute", "comm", "copy"
LOADER = (
    "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__",
    "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__",
)
_QUERY_NS = 1_500


@dataclass(frozen=True)
class Change:
    """Factors on how long things take, and whether the host waits for the device at all."""

    matmul: float = 1.0
    compute: float = 1.0
    comm: float = 1.0
    copy: float = 1.0
    host: float = 1.0
    loader: float = 1.0
    waits: bool = True


@dataclass(frozen=True)
class Traits:
    """What the machine is like. Times in ns. ``queue``: launches under way at once; further ones block the host."""

    call_ns: int = 4_000
    latency_ns: int = 5_000
    gap_ns: int = 1_000
    cross_ns: int = 1_500
    return_ns: int = 6_000
    queue: int = 1024
    prefetch: int = 0
    """Batches that loader workers keep ready; 0: the host loads by itself."""


@dataclass(frozen=True)
class Seen:
    """An event as recorded. ``lane``: the thread or the stream."""

    category: str
    name: str
    lane: int
    start: int
    end: int
    correlation: int = 0


@dataclass
class Program:
    """``ops``: (method of the machine, its arguments), in the host's order."""

    traits: Traits
    ops: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not hasattr(Machine, name):
            raise AttributeError(name)
        return lambda *args: self.ops.append((name, args))


class Machine:
    def __init__(self, traits: Traits, change: Change) -> None:
        self.traits, self.change = traits, change
        self.now, self.thread = 1_000_000, 1
        self.tail: dict[int, int] = {}
        self.ready: dict[int, int] = {}
        self.events: dict[str, int] = {}
        self.ends: list[int] = []
        self.batches: list[tuple[int, int]] = []
        self.seen: list[Seen] = []
        self._step = 0

    @property
    def span(self) -> int:
        """From the first start to the last end on the device."""
        device = [e for e in self.seen if e.category in ("kernel", "gpu_memcpy")]
        return max(e.end for e in device) - min(e.start for e in device)

    def _call(self, name: str, end: int, correlation: int = 0) -> None:
        self.seen.append(Seen("cuda_runtime", name, self.thread, self.now, end, correlation))
        self.now = end

    def _host(self, ns: float) -> int:
        return round(ns * self.change.host)

    def work(self, ns: int) -> None:
        """The host thinks, within an operator."""
        end = self.now + self._host(ns)
        self.seen.append(Seen("cpu_op", "aten::op", self.thread, self.now, end))
        self.now = end

    def _submit(self, name: str, kind: str, stream: int, ns: int) -> tuple[int, int]:
        """(when the host is free to go on submitting, when the activity ends)."""
        t = self.traits
        free = max(self.now, self.ends[-t.queue]) if len(self.ends) >= t.queue else self.now
        start = max(
            free + t.latency_ns,
            self.tail.get(stream, -t.gap_ns) + t.gap_ns,
            self.ready.pop(stream, -t.cross_ns) + t.cross_ns,
        )
        end = start + round(ns * getattr(self.change, kind))
        self.tail[stream] = end
        self.ends.append(end)
        category = "gpu_memcpy" if kind == COPY else "kernel"
        self.seen.append(Seen(category, name, stream, start, end, len(self.ends)))
        return free, end

    def launch(self, name: str, kind: str, stream: int, ns: int, call: str) -> None:
        free, _ = self._submit(name, kind, stream, ns)
        self._call(call, free + self._host(self.traits.call_ns), len(self.ends))

    def blocking_copy(self, name: str, stream: int, ns: int, call: str) -> None:
        """A copy of pageable memory: the call that starts it returns when it is over."""
        free, end = self._submit(name, COPY, stream, ns)
        back = free + self._host(self.traits.call_ns)
        if self.change.waits:
            back = max(back, end + self.traits.return_ns)
        self._call(call, back, len(self.ends))

    def record(self, event: str, stream: int) -> None:
        self.events[event] = self.tail.get(stream, 0)
        self._call("cudaEventRecord", self.now + self._host(self.traits.call_ns // 4))

    def stream_waits(self, stream: int, event: str) -> None:
        self.ready[stream] = max(self.ready.get(stream, 0), self.events[event])
        self._call("cudaStreamWaitEvent", self.now + self._host(self.traits.call_ns // 4))

    def _block(self, call: str, until: int) -> None:
        end = self.now + self._host(self.traits.call_ns)
        if self.change.waits and until > self.now:
            end = max(end, until + self.traits.return_ns)
        self._call(call, end)

    def sync_stream(self, stream: int) -> None:
        self._block("cudaStreamSynchronize", self.tail.get(stream, 0))

    def sync_device(self) -> None:
        self._block("cudaDeviceSynchronize", max(self.tail.values(), default=0))

    def sync_event(self, event: str) -> None:
        self._block("cudaEventSynchronize", self.events[event])

    def poll(self, event: str, period_ns: int, call: str) -> None:
        """The host asks again and again whether the event has come."""
        while True:
            done = self.events[event] <= self.now or not self.change.waits
            self._call(call, self.now + self._host(_QUERY_NS))
            if done:
                return
            self.now += period_ns

    def spin(self, event: str, early_ns: int) -> None:
        """The host reads a word of memory that a kernel writes ``early_ns`` before it ends: no call at all."""
        if self.change.waits:
            self.now = max(self.now, self.events[event] - early_ns + 1_000)

    def load(self, ns: int, fetch_ns: int) -> None:
        """The next batch: made by workers ahead of time, or by the host itself."""
        start, ahead, k = self.now, self.traits.prefetch, len(self.batches)
        ns, fetch_ns = round(ns * self.change.loader), round(fetch_ns * self.change.loader)
        if ahead:
            begun = max(
                self.batches[-1][0] if k else 0,
                self.batches[k - ahead][1] if k >= ahead else 0,
            )
            done = begun + ns
            self.now = max(start, done) + fetch_ns
        else:
            done = self.now = start + ns + fetch_ns
        self.batches.append((done, self.now))
        self.seen.append(Seen("user_annotation", LOADER[ahead > 0], self.thread, start, self.now))

    def hand_over(self, thread: int, ns: int) -> None:
        """The other thread goes on, as the backward pass does; this one waits for it."""
        self.now += self._host(ns)
        self.thread = thread

    def step(self) -> None:
        """A step of the profiler ends, and the next begins."""
        if self._step:
            begun = next(e for e in reversed(self.seen) if e.name == f"ProfilerStep#{self._step - 1}")
            self.seen.remove(begun)
            self.seen.append(Seen(begun.category, begun.name, begun.lane, begun.start, self.now))
        self.seen.append(Seen("user_annotation", f"ProfilerStep#{self._step}", 1, self.now, self.now + 1_000))
        self._step += 1


NOTHING = Change()


def run(program: Program, change: Change = NOTHING) -> Machine:
    machine = Machine(program.traits, change)
    for op, args in program.ops:
        getattr(machine, op)(*args)
    return machine
