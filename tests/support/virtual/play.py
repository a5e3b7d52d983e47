"""What a recorded step takes: ranks' traces, coupled by what they send each other, played under given speeds.

A kernel begins when its stream gets there; a collective when all its recorded ranks have, and a batch of messages when
both ends of each have. A communicator does one thing after the other, as NCCL's. The host takes no time, as one that
runs ahead of its device. Which kernels run depends on no time, so a step is recorded once and played as often as wanted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from support.virtual.trace import MAIN, Channel, Comm, Kernel, Record, Trace, Wait
from trainsys.telemetry.timer import DeviceTrack, MarkedStep


@dataclass(frozen=True)
class Speeds:
    link: float
    """bytes/s"""
    matmul: float = 600e12
    """FLOP/s"""
    memory: float = 2.6e12
    """bytes/s"""


class Deadlock(Exception):
    """Ranks wait for each other; says where each is."""


@dataclass(slots=True)
class _Point:
    """When something is done: ``needs`` are done, and then what it takes has passed. ``tail``: what its own stream did
    before."""

    rank: int
    stream: int
    tail: int | None
    needs: list[int]
    kernel: Kernel | None = None
    comm: Comm | None = None
    waits: bool = False
    """for another stream"""


@dataclass
class Played:
    """The second step of one rank, in seconds."""

    seconds: float
    """of the compute stream"""
    waited: dict[str, float]
    """axis -> the compute stream's, for its communication or in it"""
    phases: dict[str, float]
    """as the recorder's marks say"""
    backwards: int
    """marks that come before the one before them"""


@dataclass
class Coupled:
    """``serial``: all communicators of a rank take turns in the order of launch, as where one fills the device."""

    traces: Sequence[Trace]
    serial: bool = False
    _points: list[_Point] = field(default_factory=list)
    _events: dict[tuple[int, int], int | None] = field(default_factory=dict)
    """(rank, event) -> its point"""

    def __post_init__(self) -> None:
        self._meet: dict[tuple[Channel, int], list[tuple[int, int]]] = defaultdict(list)
        self._ends: dict[tuple[Channel, int, int, bool], list[tuple[int, int]]] = defaultdict(list)
        for trace in self.traces:
            self._add(trace)
        for met in self._meet.values():
            for ready, done in met:
                self._points[done].needs += [other for other, _ in met if other != ready]
        for (channel, source, to, sends), ends in self._ends.items():
            other = self._ends.get((channel, source, to, not sends), [])
            recorded = any(t.rank == (to if sends else source) for t in self.traces)
            for i, (_, done) in enumerate(ends):
                if i < len(other):
                    self._points[done].needs.append(other[i][0])
                elif recorded:
                    raise Deadlock(f"message {i} from rank {source} to {to} has one end")
        self._order = self._sorted()

    def _add(self, trace: Trace) -> None:
        tails: dict[int, int | None] = defaultdict(lambda: None)
        turns: dict[Channel | None, int] = {}
        calls: dict[Channel, int] = defaultdict(int)
        for node in trace.nodes:
            if isinstance(node, Record):
                self._events[trace.rank, node.event] = tails[node.stream]
            elif isinstance(node, Wait):
                event = self._events[trace.rank, node.event]
                if event is not None and event != tails[node.stream]:
                    tails[node.stream] = self._point(trace.rank, node.stream, tails, [event], waits=True)
            elif isinstance(node, Kernel):
                tails[node.stream] = self._point(trace.rank, node.stream, tails, kernel=node)
            elif isinstance(node, Comm):
                turn = None if self.serial else node.channel
                before = [turns[turn]] if turn in turns else []
                ready = self._point(trace.rank, node.stream, tails, before)
                done = self._point(trace.rank, node.stream, tails, [ready], comm=node)
                tails[node.stream] = turns[turn] = done
                if not node.messages:
                    self._meet[node.channel, calls[node.channel]].append((ready, done))
                    calls[node.channel] += 1
                for m in node.messages:
                    ends = (trace.rank, m.peer) if m.sends else (m.peer, trace.rank)
                    self._ends[node.channel, *ends, m.sends].append((ready, done))

    def _point(
        self, rank: int, stream: int, tails: Mapping[int, int | None], needs: Sequence[int] = (), **of: Any
    ) -> int:
        tail = tails[stream]
        self._points.append(_Point(rank, stream, tail, [*needs, *([] if tail is None else [tail])], **of))
        return len(self._points) - 1

    def _sorted(self) -> list[int]:
        """Points, each behind all that it needs."""
        behind: dict[int, list[int]] = defaultdict(list)
        missing = [len(p.needs) for p in self._points]
        for i, point in enumerate(self._points):
            for need in point.needs:
                behind[need].append(i)
        ready, order = deque(i for i, n in enumerate(missing) if n == 0), []
        while ready:
            order.append(i := ready.popleft())
            for later in behind[i]:
                missing[later] -= 1
                if missing[later] == 0:
                    ready.append(later)
        if len(order) < len(self._points):
            stuck: dict[int, str] = {}
            for i, point in enumerate(self._points):
                if missing[i] and point.comm is not None and point.rank not in stuck:
                    comm = point.comm
                    stuck[point.rank] = f"rank {point.rank} at {comm.axis} {comm.op} {comm.messages}"
            raise Deadlock("; ".join(stuck.values()))
        return order

    def play(self, speeds: Speeds) -> dict[int, Played]:
        """By rank."""
        at, axis = [0.0] * len(self._points), [""] * len(self._points)
        waits: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
        for i in self._order:
            p = self._points[i]
            began = 0.0 if p.tail is None else at[p.tail]
            axis[i] = "" if p.tail is None else axis[p.tail]
            at[i] = began
            for need in p.needs:
                if at[need] > at[i]:
                    at[i], axis[i] = at[need], axis[need] or axis[i]
            if p.kernel is not None:
                at[i] += p.kernel.flops / speeds.matmul if p.kernel.flops else p.kernel.nbytes / speeds.memory
            if p.comm is not None:
                at[i] += p.comm.nbytes / speeds.link
                axis[i] = p.comm.axis
            if p.stream == MAIN and at[i] > began and (p.waits or p.comm is not None):
                waits[p.rank].append((began, at[i], axis[i]))
        return {trace.rank: self._played(trace, at, waits[trace.rank]) for trace in self.traces}

    def _played(self, trace: Trace, at: list[float], waits: list[tuple[float, float, str]]) -> Played:
        def when(event: int) -> float:
            point = self._events[trace.rank, event]
            return 0.0 if point is None else at[point]

        names, events = trace.marks[1]
        begin, end = when(events[0]), when(events[-1])
        waited: dict[str, float] = defaultdict(float)
        for began, ended, axis in waits:
            if ended > begin:
                waited[axis] += ended - max(began, begin)
        times = [when(event) for event in events]
        backwards = sum(b < a for a, b in pairwise(times))
        return Played(end - begin, dict(waited), _resolved(names, times), backwards)


class _Done:
    """A timer whose marks are times, all of them past."""

    def elapsed(self, first: float, last: float) -> float:
        return last - first

    def recycle(self, handles: object) -> None:
        pass


def _resolved(names: list[str], times: list[float]) -> dict[str, float]:
    """Seconds by phase, as the product's own track makes them of marks."""
    track, step = DeviceTrack(_Done()), MarkedStep()  # type: ignore[arg-type]
    step.names, step.marks = names, times
    track._pending.append(step)
    return track.resolve()[0][1]
