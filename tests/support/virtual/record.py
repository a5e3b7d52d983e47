"""The real engine, FSDP2 and recorder for a few steps of one rank, on fake tensors, written down as a `Trace`.

Streams and events stand where FSDP2 looks for those of a CPU, so that it takes the way that it takes on a GPU.
Simulated: nothing here has run on a device.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.virtual.communication import Communication
from support.virtual.device import Device
from support.virtual.operations import Operations
from support.virtual.trace import MAIN, Trace
from trainsys.config.run import RunConfig
from trainsys.dryrun import step as dry
from trainsys.dryrun.swap import swapped
from trainsys.dryrun.world import as_on_cuda, rank_of, without_memory
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.expert import route
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.events import RunStart
from trainsys.telemetry.recorder import Recorder
from trainsys.train.device import CudaTimer


class _Timer(CudaTimer):
    """The product's, which counts marks that are not on the stream that computes."""

    foreign = 0

    def mark(self) -> Any:
        event = super().mark()
        self.foreign += event.stream != MAIN
        return event


def record(cfg: RunConfig, world: int, rank: int, device: Device | None = None, steps: int = 2) -> Trace:
    """``steps`` of ``rank``, at least two, in a process without a process group; ``device``: another kind of one."""
    layout = Layout.resolve(cfg.parallel, world)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = device or Device()
    operations = Operations(device)
    with ExitStack() as stack:
        for name in ("Stream", "Event", "current_stream", "stream", "synchronize"):
            stack.enter_context(swapped(torch.cpu, name, getattr(device, name)))
        for context in (rank_of(world, rank), without_memory(fake), as_on_cuda()):
            stack.enter_context(context)
        mesh = Mesh(layout, torch.device("cpu"))
        timer = _Timer(device)
        start = RunStart(run_id="r", rank=rank, world=world, t0_wall=0.0, t0_mono=0.0)
        recorder = Recorder(None, start, timer=timer, watch_gc=False)
        mesh.ledger.recorder = recorder
        engine = NativeEngine(cfg, mesh, recorder)
        dry._unshard_on_streams(engine)
        data = dry._step_data(cfg, layout)
        name_of = {axis: g.group.group_name for axis, g in mesh._axes.items() if g.group is not None}
        axis_of = {name: axis for axis, name in reversed(name_of.items())}  # the first axis stands for all
        stack.enter_context(swapped(torch.UntypedStorage, "resize_", _resizing(operations)))
        stack.enter_context(swapped(route, "_read", _reading(device)))
        stack.enter_context(Communication(device, operations, axis_of).seen())
        stack.enter_context(fake)
        stack.enter_context(operations)
        recorder.begin()
        engine.train_step(0, data)
        recorder.end_step(0)
        second = len(device.nodes)
        for step in range(1, steps):
            engine.train_step(step, data)
            recorder.end_step(step)
        nodes = list(device.nodes)
    assert recorder._device is not None
    marks = [(step.names, [m.number for m in step.marks]) for step in recorder._device._pending]
    groups = {axis: axis_of[name] for axis, name in name_of.items()}
    return Trace(rank, nodes, marks, second, groups, timer.foreign)


def _resizing(operations: Operations) -> Any:
    """FSDP2 empties and fills storages without any operation."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        done = resize(storage, size)
        operations.resized(storage, before)
        return done

    return resize_


def _reading(device: Device) -> Any:
    """On a device the counts of rows for each expert are read back; a dry run takes them to be even."""
    read = route._read

    def _read(*args: Any) -> Any:
        device.host_sync("rows of experts")
        return read(*args)

    return _read
