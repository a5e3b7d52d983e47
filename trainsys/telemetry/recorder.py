"""Where a rank's time goes, step by step, for a few microseconds per step.

``telemetry.step_clock`` does the accounting: phases are exclusive and sum to the step time by construction; what no
phase claims is ``other``. Here it becomes records.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from trainsys.telemetry.events import (
    COMM,
    Comm,
    DeviceStep,
    Event,
    Flops,
    HostTime,
    Memory,
    Message,
    Metrics,
    RunEnd,
    RunStart,
    Stall,
    Step,
    split_nonfinite,
)
from trainsys.telemetry.host_memory import host_memory
from trainsys.telemetry.host_time import HostTimes
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.resolution import Resolution
from trainsys.telemetry.spans import STALL, Collective, Pause, Phase
from trainsys.telemetry.step_clock import StepClock
from trainsys.telemetry.timer import DeviceTrack, Timer
from trainsys.telemetry.writer import EventWriter

__all__ = ["Recorder", "here", "host_memory"]

SAMPLED = ("forward", "backward")
"""Phases whose single calls are kept (one a micro-batch), which tells long sequences from slow hardware."""
GC_STALL_S = 0.01
"""A garbage collection at least this long gets a record of its own; shorter ones are in the phase ``gc``
alone."""


READ_NS = 100_000_000
"""Between two readings of memory and of the host's counters, which take as long as all else that a short step is charged
for."""


def here(**fields: Any) -> RunStart:
    """A ``RunStart`` with this process's clock anchors, host name and pid filled in; ``fields`` are the
    others."""
    return RunStart(
        t0_wall=time.time(),
        t0_mono=time.perf_counter(),
        hostname=socket.gethostname(),
        pid=os.getpid(),
        **fields,
    )


class Recorder:
    """One rank's record of a run. Writes the rank's event file (or none, with ``run_dir=None``).

    Call ``begin()`` just before the loop, then once a step ``end_step``; between them, phases::

        with rec.phase("forward"): ...
        with rec.collective_span("tp", "all_reduce", nbytes): ...   # or rec.collective(...) afterwards
        with rec.stall("checkpoint"): ...                           # a pause that is no part of a step

    Phases, collectives and stalls are for the thread that runs the step (or one that it waits for:
    autograd's). ``message``, ``metrics`` and ``put`` may come from any thread.

    Arguments:
        run_dir: the run's folder, or None to write nothing.
        info: the first record; ``here(...)`` makes one. Its ``peak_flops`` gives steps their MFU.
        timer: device marks (CUDA events); None on CPU, where the host's clock tells all.
        memory: called at an ``end_step`` every 100 ms at most (steps between show the same); ``host_memory`` by
        default.
        clock: nanoseconds of a monotonic clock, the one that ``info.t0_mono`` was read from; injected by
        tests.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        info: RunStart,
        *,
        timer: Timer | None = None,
        memory: Callable[[], Memory] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
        watch_gc: bool = True,
    ) -> None:
        self.info = info
        self.last_device: DeviceStep | None = None
        """The newest step whose device time is known; None without a device timer."""
        self._now = clock
        self._read_memory = memory or host_memory
        self._memory: Memory | None = None
        self._host_times = HostTimes()
        self._host: HostTime | None = None
        self._read_due = 0
        self._writer = None if run_dir is None else EventWriter(
            event_file(run_dir, info.rank), kept=Resolution(info).kept
        )
        self._device = None if timer is None else DeviceTrack(timer)
        self._clock = StepClock(clock, int(info.t0_mono * 1e9), SAMPLED, self._device)
        self._owner = threading.get_ident()
        self._step = info.first_step - 1
        self._gc_t0 = 0
        self._closed = False
        self.put(info)
        if watch_gc:
            gc.callbacks.append(self._on_gc)

    def phase(self, name: str) -> Phase:
        """``with rec.phase("forward"):`` the time inside is ``name``'s, less what an inner phase claims."""
        return self._clock.phase(name)

    def collective_span(self, axis: str, op: str, nbytes: int) -> Collective:
        """A context manager around a blocking collective, or around the wait for one: on a device it is
        marked too. It can be entered again and again, as the ledger of communication does, but not within itself.

        ``axis``: mesh axis or combined group; ``nbytes``: payload of this rank. It counts one call. Spans of one
        axis must not be nested.
        """
        return self._clock.collective(axis, op, nbytes)

    def waiting(self, axis: str, stream: Any) -> AbstractContextManager[None]:
        """Around the wait of a device's ``stream`` for a collective of ``axis`` that runs on another stream: the
        device's time, where ``stream`` is the compute stream. It counts no call, for the launch did."""
        return self._clock.waiting(axis, stream)

    def collective(self, axis: str, op: str, nbytes: int, blocked_s: float) -> None:
        """The same after the fact: ``blocked_s`` seconds are taken from the phase under way.

        No more than that phase has had can be taken (the sum must hold); ``blocked_s`` 0 counts bytes and
        calls of a collective that overlapped. Within a stall nothing is counted: the stall has the time. Not for
        the inside of a ``collective_span``.
        """
        clock = self._clock
        total = clock.total(axis, op)
        total.calls += 1
        total.nbytes += nbytes
        if blocked_s > 0.0:
            total.ns += clock.take(int(blocked_s * 1e9))

    def stall(self, kind: str, detail: str = "") -> Pause:
        """A pause that is no part of a step: checkpoint, eval, compile, data_retry, report.

        Its time, phases inside included, is left out of ``step_time_s`` and stands in ``Step.stalls``; it
        also gets a ``Stall`` record at once, so that a run killed in a checkpoint shows it.
        """
        return Pause(self._clock, kind, detail, self._put_stall)

    def begin(self) -> None:
        """The loop starts now: what went before, from ``info.t0_mono``, is the stall ``setup``, and no step's
        time."""
        now = self._now()
        self._put_stall("setup", self._clock.began, now - self._clock.began)
        self._clock.end(now)
        if self._device:
            self._device.restart(self._clock.on_device)

    def end_step(
        self,
        step: int,
        *,
        tokens: int = 0,
        tokens_padded: int = 0,
        attn_pairs: int = 0,
        loss: float | None = None,
        grad_norm: float | None = None,
        lr: float | None = None,
        flops: Flops | None = None,
    ) -> Step:
        """Closes the step, records and returns it; the next one starts here.

        ``flops`` (over all ranks) with ``info.peak_flops`` gives the MFU fields; without either they stay
        None.
        """
        now = self._now()
        if now >= self._read_due:
            self._memory, self._host = self._read_memory(), self._host_times.read()
            now = self._now()
            self._read_due = now + READ_NS
        times = self._clock.end(now)
        step_time_s = times.step_ns / 1e9
        phases = {name: ns / 1e9 for name, ns in times.phases.items()}
        comm: dict[str, dict[str, Comm]] = {}
        for (axis, op), (calls, nbytes, ns) in times.totals.items():
            ops = comm.get(axis)
            if ops is None:
                ops = comm[axis] = {}
            ops[op] = Comm(calls, nbytes, ns / 1e9)
            if ns:
                phases[COMM + axis] = phases.get(COMM + axis, 0.0) + ns / 1e9
        finite = isfinite(loss or 0.0) and isfinite(grad_norm or 0.0) and isfinite(lr or 0.0)
        record = Step(
            step, self._time_of(times.began), step_time_s, phases,
            {kind: ns / 1e9 for kind, ns in times.stalls.items()} if times.stalls else {},
            comm, times.calls_us, tokens, tokens_padded, attn_pairs, loss, grad_norm, lr, self._memory, flops, self._host,
        )  # fmt: skip
        if not finite:
            record.nonfinite = split_nonfinite((("loss", loss), ("grad_norm", grad_norm), ("lr", lr)))
        if flops is not None and self.info.peak_flops and times.step_ns > 0:
            possible = step_time_s * self.info.peak_flops * self.info.world
            record.mfu = flops.model / possible
            record.mfu_palm = None if flops.palm is None else flops.palm / possible
            record.hfu = None if flops.hardware is None else flops.hardware / possible
        self._step = step
        self.put(record)
        if self._device:
            self._put_device(self._device.end_step(step, self._clock.on_device))
        return record

    def message(self, level: Literal["info", "warning", "error"], text: str) -> None:
        """Something said to the user, kept beside the numbers."""
        self.put(Message(level=level, text=text, time_s=self._time_of(self._now()), step=self._step))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Named values that belong to no step record (evaluation)."""
        self.put(Metrics(step=step, values=dict(values), nonfinite=split_nonfinite(values.items())))

    def put(self, event: Event) -> None:
        """Any other record."""
        if self._writer is not None:
            self._writer.put(event)

    def drain(self) -> None:
        """Waits until what was recorded is in its file: a checkpoint must not be ahead of the record of its steps."""
        if self._writer is not None:
            self._writer.drain()

    def finish(self, status: Literal["done", "stopped", "failed"], reason: str = "") -> None:
        """The last record, and the file's end. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)
        if self._device:
            self._put_device(self._device.resolve())
        now = self._time_of(self._now())
        lost = 0 if self._writer is None else self._writer.lost
        self.put(RunEnd(status=status, time_s=now, step=self._step, reason=reason, lost=lost))
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("done")
        else:
            self.finish("failed", f"{type(error).__name__}: {error}")

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        # A collection in a helper thread does not stop the step's native code; one in autograd's does (the
        # step waits for it). Threads that Python did not start, such as autograd's, are "Dummy-" threads.
        if threading.get_ident() != self._owner and not threading.current_thread().name.startswith("Dummy-"):
            return
        if phase == "start":
            self._gc_t0 = self._now()
            return
        t0, self._gc_t0 = self._gc_t0, 0
        if not t0 or self._clock.stall_depth:
            return
        ns = self._now() - t0
        self._clock.collected(ns)
        if ns >= GC_STALL_S * 1e9:
            self._put_stall("gc", t0, ns, f"generation {info['generation']}", in_step=True)

    def _put_stall(self, kind: str, t0: int, ns: int, detail: str = "", in_step: bool = False) -> None:
        self.put(
            Stall(
                kind=kind,
                start_s=self._time_of(t0),
                seconds=ns / 1e9,
                step=self._step + 1,
                detail=detail,
                in_step=in_step,
            )
        )

    def _put_device(self, finished: list[tuple[int, dict[str, float]]]) -> None:
        for step, seconds in finished:
            phases = {name: s for name, s in seconds.items() if not name.startswith(STALL)}
            self.last_device = DeviceStep(step=step, step_time_s=sum(phases.values()), phases=phases)
            self.put(self.last_device)

    def _time_of(self, mono: int) -> float:
        """Seconds since the epoch of a reading of the clock, to the microsecond."""
        return round(self.info.t0_wall + mono / 1e9 - self.info.t0_mono, 6)
