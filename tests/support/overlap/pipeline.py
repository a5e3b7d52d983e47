"""Activations and gradients that travel beside the next micro-batch's work."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from support.overlap.link import ATTEMPTS, Lane, Late, sleep_until
from trainsys.comm.group import AxisGroup
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.runtime import Runtime
from trainsys.parallel.pipeline.transport import Transport
from trainsys.schedules import build
from trainsys.schedules.program import programs

RANKS, MICROS = 2, 6


class _Stamped(dist.Work):
    """A message says when it has passed."""

    def __init__(self, work: dist.Work, message: Tensor) -> None:
        super().__init__()
        self._work, self._message = work, message

    def wait(self, *args: object) -> bool:
        self._work.wait()
        sleep_until(float(self._message))
        return True


class _SlowTransport(Transport):
    """One lane for what this rank sends."""

    def __init__(self, group: AxisGroup, message_s: float, *, overlap: bool) -> None:
        super().__init__(group, lambda: torch.empty((), dtype=torch.float64), overlap=overlap)
        self.message_s, self.lane = message_s, Lane()

    def _post(self, todo: list[dist.P2POp]) -> list[dist.Work]:
        until = {}
        for i, message in enumerate(todo):
            if message.op is dist.isend:
                until[i] = self.lane.take(self.message_s)
                message.tensor.fill_(until[i])
        works = super()._post(todo)
        return [
            Late(work, until[i]) if i in until else _Stamped(work, todo[i].tensor)
            for i, work in enumerate(works)
        ]


class _Sleeps:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def forward(self, micro: int, x: Tensor | None) -> Tensor:
        time.sleep(self.seconds)
        return torch.zeros((), dtype=torch.float64)

    def backward(self, micro: int, grad: Tensor | None, *, weights: bool) -> Tensor | None:
        time.sleep(self.seconds)
        return torch.zeros((), dtype=torch.float64)

    def backward_weight(self, micro: int) -> None: ...

    def gather(self) -> None: ...

    def release(self) -> None: ...

    def reduce(self) -> None: ...


class _FirstSleeps(_Sleeps):
    def backward(self, micro: int, grad: Tensor | None, *, weights: bool) -> Tensor | None:
        super().backward(micro, grad, weights=weights)
        return None


def measure(on: bool, comm_s: float, compute_s: float) -> list[float]:
    """GPipe over two ranks: how much longer the step is than without communication. Forward and backward of a
    micro-batch take ``compute_s`` each, a message ``comm_s``."""
    pp = Mesh(Layout(pp=RANKS), torch.device("cpu"))["pp"]
    schedule = build("gpipe", RANKS, MICROS)
    stage = (_FirstSleeps if pp.index == 0 else _Sleeps)(compute_s)
    runtime = Runtime(
        programs(schedule)[pp.index],
        {pp.index: stage},
        schedule.stages,
        _SlowTransport(pp, comm_s, overlap=on),
    )
    found = []
    for _ in range(ATTEMPTS):
        dist.barrier()
        start = time.perf_counter()
        runtime.run()
        every = [(0.0, 0.0)] * RANKS
        dist.all_gather_object(every, (start, time.perf_counter()))
        step = max(end for _, end in every) - max(start for start, _ in every)
        found.append(step - 2 * (MICROS + 1) * compute_s)
    return found


def predict(on: bool, comm_s: float, compute_s: float) -> float:
    """Each way, the first message has nothing to hide behind; if sends are waited for, none has."""
    hidden = compute_s if on else 0.0
    return 2 * (comm_s + (MICROS - 1) * max(0.0, comm_s - hidden))
