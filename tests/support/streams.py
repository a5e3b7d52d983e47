"""A device's streams as clocks, under the real engine on fake tensors: what the compute stream truly waits for.

A kernel takes time on the stream that is current: products by their FLOPs, others by their bytes. A collective runs on
a stream of its group, from when the current stream gets there, for its bytes over a link; who waits for it waits until
its end. The host takes no time, as a host that runs ahead of its device. Streams and events stand where FSDP2 looks
for those of a CPU, so that it takes the way that it takes on a GPU. Simulated: nothing here has run on one.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainsys.config.run import RunConfig
from trainsys.dryrun import step as dry
from trainsys.dryrun.swap import swapped
from trainsys.dryrun.world import as_on_cuda, rank_of, without_memory
from trainsys.engines.native import NativeEngine
from trainsys.engines.observed import _METHODS
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.events import COMM, DeviceStep, RunStart
from trainsys.telemetry.recorder import Recorder
from trainsys.train.device import CudaTimer

MATMUL = 600e12
"""FLOP/s"""
MEMORY = 2.6e12
"""bytes/s"""


class Stream:
    """``t``: when all that it was given is done; ``axis``: of the last collective in it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.t, self.axis = 0.0, ""

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def wait_stream(self, other: Any) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.t, self.axis, self.stream = 0.0, "", None

    def record(self, stream: Any = None) -> None:
        stream = stream or device.current_stream()
        self.t, self.axis, self.stream = stream.t, stream.axis, stream

    def wait(self, stream: Any = None) -> None:
        device.wait(stream or device.current_stream(), self.t, self.axis)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.t - self.t)


class Device:
    """What ``torch.cuda`` is to a product: streams, events and which stream is current."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.main = Stream()
        self.stack = [self.main]
        self.waited: dict[str, float] = defaultdict(float)
        """axis -> seconds that the compute stream waited for its collectives"""
        self.marks: list[Event] = []

    def current_stream(self, *_: Any) -> Stream:
        return self.stack[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.stack.append(stream or self.stack[-1])
        try:
            yield
        finally:
            self.stack.pop()

    def spend(self, seconds: float) -> None:
        # A product's stand-in for a stream passes reads on, not writes.
        stream = getattr(self.stack[-1], "_stream", self.stack[-1])
        stream.t += seconds

    def wait(self, stream: Any, until: float, axis: str) -> None:
        stream = getattr(stream, "_stream", stream)
        if until > stream.t:
            if stream is self.main:
                self.waited[axis] += until - stream.t
            stream.t = until
            stream.axis = axis or stream.axis


device = Device()


class Timer(CudaTimer):
    """The product's, noting its marks."""

    def mark(self) -> Any:
        event = super().mark()
        device.marks.append(event)
        return event

    def recycle(self, handles: Sequence[Any]) -> None:
        pass  # each mark is looked at afterwards


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 2.0
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten" or func.is_view or "empty" in func.__name__:
            return out
        if func._overloadpacket in flop_registry:
            device.spend(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) / MATMUL)
        else:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            device.spend(sum(t.numel() * t.element_size() for t in tensors) / MEMORY)
        return out


class _Work(dist.Work):
    def __init__(self, until: float, axis: str) -> None:
        super().__init__()
        self._until, self._axis = until, axis

    def wait(self, *_: Any) -> bool:
        device.wait(device.current_stream(), self._until, self._axis)
        return True


@contextmanager
def _collectives(axis_of: dict[str, str], link: float) -> Iterator[None]:
    """Calls of a process group take time on a stream of the group; ``axis_of``: its name -> axis."""
    streams: dict[str, Stream] = defaultdict(Stream)
    with ExitStack() as stack:
        for name, (_, sent) in _METHODS.items():
            real = getattr(dist.ProcessGroup, name, None)
            if real is None:
                continue

            def call(group: Any, *args: Any, real: Any = real, sent: Any = sent, **kwargs: Any) -> Any:
                with torch.utils._python_dispatch._disable_current_modes():
                    count = sent(group.rank(), group.size(), *args, *kwargs.values())
                real(group, *args, **kwargs)
                own, axis = streams[group.group_name], axis_of[group.group_name]
                own.t = max(own.t, device.current_stream().t) + count / link
                return _Work(own.t, axis)

            stack.enter_context(swapped(dist.ProcessGroup, name, functools.wraps(real)(call)))
        yield


@dataclass
class Played:
    """One step: what was true on the compute stream, and what the recorder says."""

    seconds: float
    waited: dict[str, float]
    said: DeviceStep
    foreign: int
    """marks on another stream"""
    marks: int
    negative: int = 0
    same: dict[str, str] = field(default_factory=dict)
    """axis -> the one that stands for all axes of the same process group; ``waited`` knows groups alone"""

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds of communication on the device by axis, as the recorder has them."""
        found: dict[str, float] = defaultdict(float)
        for phase, seconds in self.said.phases.items():
            if phase.startswith(COMM):
                found[self.same[phase.removeprefix(COMM)]] += seconds
        return dict(found)


def play(cfg: RunConfig, world: int, rank: int, links: Sequence[float]) -> list[Played]:
    """A step of ``rank`` for each link (bytes/s), after one in which what is made once is made; in a process without
    a process group."""
    layout = Layout.resolve(cfg.parallel, world)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    names = ("Stream", "Event", "current_stream", "stream")
    played = []
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(swapped(torch.cpu, name, getattr(device, name)))
        for context in (rank_of(world, rank), without_memory(fake), as_on_cuda()):
            stack.enter_context(context)
        mesh = Mesh(layout, torch.device("cpu"))
        start = RunStart(run_id="r", rank=rank, world=world, t0_wall=0.0, t0_mono=0.0)
        recorder = Recorder(None, start, timer=Timer(device), watch_gc=False)
        mesh.ledger.recorder = recorder
        engine = NativeEngine(cfg, mesh, recorder)
        dry._unshard_on_streams(engine)
        data = dry._step_data(cfg, layout)
        group_of = {axis: g.group.group_name for axis, g in mesh._axes.items() if g.group is not None}
        axis_of = {name: axis for axis, name in group_of.items()}
        stack.enter_context(fake)
        stack.enter_context(_Kernels())
        recorder.begin()
        for number, link in enumerate((links[0], *links)):
            began, before = device.main.t, dict(device.waited)
            device.marks.clear()
            with _collectives(axis_of, link):
                engine.train_step(number, data)
            recorder.end_step(number)
            marks = device.marks
            assert recorder.last_device is not None
            played.append(
                Played(
                    device.main.t - began,
                    {a: s - before.get(a, 0.0) for a, s in device.waited.items() if s > before.get(a, 0.0)},
                    recorder.last_device,
                    sum(mark.stream is not device.main for mark in marks),
                    len(marks),
                    sum(b.t < a.t for a, b in pairwise(marks)),
                    {axis: axis_of[name] for axis, name in group_of.items()},
                )
            )
    return played[1:]
