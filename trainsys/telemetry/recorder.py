"""Where a rank's time goes, step by step, for a few microseconds a step.

The step thread's time is cut at every transition (a phase begins or ends, a collective returned, a step
ended) and each piece is given to what was innermost. So phases are exclusive and sum to the step time by
construction; what no phase claims is ``other``.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from trainsys.telemetry.events import (
    COMM,
    Comm,
    DeviceStep,
    Event,
    Flops,
    Memory,
    Message,
    Metrics,
    RunEnd,
    RunStart,
    Stall,
    Step,
    split_nonfinite,
)
from trainsys.telemetry.reader import event_file
from trainsys.telemetry.timer import DeviceTrack, Timer
from trainsys.telemetry.writer import EventWriter

SAMPLED = ("forward", "backward")
"""Phases whose single calls are kept (one a micro-batch), which tells long sequences from slow hardware."""
MAX_SAMPLES = 256
GC_STALL_S = 0.01
"""A garbage collection at least this long gets a record of its own; shorter ones are in the phase ``gc``
alone."""
MAX_CACHED = 4096
"""Distinct collectives kept; sizes that vary without end (uneven all-to-all) start the cache anew."""
_STALL = "stall/"


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


class _Span:
    """A reusable context manager: it holds no state of its own, so one object a name serves any nesting."""

    __slots__ = ("_name", "_recorder")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __enter__(self) -> None:
        self._recorder._enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._recorder._leave()


class _Collective:
    """The hottest of all, dozens a layer: so it is cached, holds no state, and its two cuts are written out here."""

    __slots__ = ("_key", "_name", "_nbytes", "_recorder")

    def __init__(self, recorder: Recorder, axis: str, op: str, nbytes: int) -> None:
        self._recorder, self._nbytes = recorder, nbytes
        self._key, self._name = (axis, op), COMM + axis

    def __enter__(self) -> None:
        r = self._recorder
        if r._stall_depth:
            return
        acc, top, name = r._acc, r._top, self._name
        now = r._clock()
        acc[top] = acc.get(top, 0) + now - r._last
        r._last = now
        r._stack.append((top, acc.get(name, 0)))
        r._top = name
        if r._device is not None:
            r._device.mark(name)

    def __exit__(self, *_: object) -> None:
        r = self._recorder
        if r._stall_depth:
            return
        acc, name = r._acc, self._name
        now = r._clock()
        total = acc[name] = acc.get(name, 0) + now - r._last
        r._last = now
        r._top, before = r._stack.pop()
        if r._device is not None:
            r._device.mark(r._top)
        r._count(self._key, self._nbytes, total - before)


class _Pause:
    __slots__ = ("_detail", "_kind", "_recorder", "_t0")

    def __init__(self, recorder: Recorder, kind: str, detail: str) -> None:
        self._recorder, self._kind, self._detail = recorder, kind, detail

    def __enter__(self) -> None:
        self._recorder._enter(_STALL + self._kind)
        self._recorder._stall_depth += 1
        self._t0 = self._recorder._last

    def __exit__(self, *_: object) -> None:
        r = self._recorder
        r._stall_depth -= 1
        r._leave()
        if r._stall_depth == 0:
            r._put_stall(self._kind, self._t0, r._last - self._t0, self._detail, in_step=False)


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
        memory: called at each ``end_step``; ``host_memory`` by default.
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
        self._clock = clock
        self._memory = memory or host_memory
        self._writer = None if run_dir is None else EventWriter(event_file(run_dir, info.rank))
        self._device = None if timer is None else DeviceTrack(timer)
        self._owner = threading.get_ident()
        self._spans: dict[str, _Span] = {}
        self._collectives: dict[tuple[str, str, int], _Collective] = {}
        self._top = "other"
        self._stack: list[tuple[str, int]] = []
        self._stall_depth = 0
        self._step = info.first_step - 1
        self._gc_t0 = 0
        self._closed = False
        self._comm: dict[tuple[str, str], list[int]] = {}
        self._micro: dict[str, list[int]] = {}
        self._reset(int(info.t0_mono * 1e9))
        self.put(info)
        if watch_gc:
            gc.callbacks.append(self._on_gc)

    def phase(self, name: str) -> _Span:
        """``with rec.phase("forward"):`` the time inside is ``name``'s, less what an inner phase claims."""
        span = self._spans.get(name)
        if span is None:
            span = self._spans[name] = _Span(self, name)
        return span

    def collective_span(self, axis: str, op: str, nbytes: int) -> _Collective:
        """A context manager around a blocking collective, or around the wait for one: on a device it is
        marked too.

        ``axis``: mesh axis or combined group; ``nbytes``: payload of this rank. It counts one call. Spans of one
        axis must not be nested.
        """
        key = (axis, op, nbytes)
        span = self._collectives.get(key)
        if span is None:
            if len(self._collectives) >= MAX_CACHED:
                self._collectives.clear()
            span = self._collectives[key] = _Collective(self, axis, op, nbytes)
        return span

    def collective(self, axis: str, op: str, nbytes: int, blocked_s: float) -> None:
        """The same after the fact: ``blocked_s`` seconds are taken from the phase under way.

        No more than that phase has had can be taken (the sum must hold); ``blocked_s`` 0 counts bytes and
        calls of a collective that overlapped. Within a stall nothing is counted: the stall has the time.
        """
        if self._stall_depth:
            return
        ns = 0
        if blocked_s > 0.0:
            ns = int(blocked_s * 1e9)
            acc, top = self._acc, self._top
            if ns > acc.get(top, 0):
                self._cut()
                ns = min(ns, acc[top])
            if ns > 0:
                acc[top] -= ns
                name = COMM + axis
                acc[name] = acc.get(name, 0) + ns
        self._count((axis, op), nbytes, ns)

    def stall(self, kind: str, detail: str = "") -> _Pause:
        """A pause that is no part of a step: checkpoint, eval, compile, data_retry, report.

        Its time, phases inside included, is left out of ``step_time_s`` and stands in ``Step.stalls``; it
        also gets a ``Stall`` record at once, so that a run killed in a checkpoint shows it.
        """
        return _Pause(self, kind, detail)

    def begin(self) -> None:
        """The loop starts now: what went before, from ``info.t0_mono``, is the stall ``setup``, and no step's
        time."""
        now = self._clock()
        self._put_stall("setup", self._began, now - self._began, "", in_step=False)
        self._comm, self._micro = {}, {}
        self._reset(now)
        if self._device:
            self._device.restart(self._top)

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
        memory = self._memory()
        now = self._cut()
        began, acc, by_op, micro = self._began, self._acc, self._comm, self._micro
        self._comm, self._micro = {}, {}
        self._reset(now)
        # The total is the clock's and "other" the remainder, so that the sum holds whatever interrupted the
        # bookkeeping (a collection of garbage can strike between any two of its lines).
        total = now - began
        other = total
        stalls, phases = {}, {}
        for name, ns in acc.items():
            if name.startswith(_STALL):
                stalls[name[len(_STALL) :]] = ns / 1e9
                total -= ns
                other -= ns
            elif name != "other":
                phases[name] = ns / 1e9
                other -= ns
        phases["other"] = other / 1e9
        step_time_s = total / 1e9
        comm: dict[str, dict[str, Comm]] = {}
        for (axis, op), (calls, nbytes, ns) in by_op.items():
            comm.setdefault(axis, {})[op] = Comm(calls, nbytes, ns / 1e9)
        record = Step(
            step=step,
            start_s=self._time_of(began),
            step_time_s=step_time_s,
            phases=phases,
            stalls=stalls,
            comm=comm,
            micro_us={name: calls for name, calls in micro.items() if len(calls) > 1},
            tokens=tokens,
            tokens_padded=tokens_padded,
            attn_pairs=attn_pairs,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            memory=memory,
            flops=flops,
            nonfinite=split_nonfinite((("loss", loss), ("grad_norm", grad_norm), ("lr", lr))),
        )
        if flops is not None and self.info.peak_flops and total > 0:
            possible = step_time_s * self.info.peak_flops * self.info.world
            record.mfu = flops.model / possible
            record.mfu_palm = None if flops.palm is None else flops.palm / possible
            record.hfu = None if flops.hardware is None else flops.hardware / possible
        self._step = step
        self.put(record)
        if self._device:
            self._put_device(self._device.end_step(step, self._top))
        return record

    def message(self, level: Literal["info", "warning", "error"], text: str) -> None:
        """Something said to the user, kept beside the numbers."""
        self.put(Message(level=level, text=text, time_s=self._time_of(self._clock()), step=self._step))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Named values that belong to no step record (evaluation)."""
        self.put(Metrics(step=step, values=dict(values), nonfinite=split_nonfinite(values.items())))

    def put(self, event: Event) -> None:
        """Any other record."""
        if self._writer is not None:
            self._writer.put(event)

    def finish(self, status: Literal["done", "stopped", "failed"], reason: str = "") -> None:
        """The last record, and the file's end. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)
        if self._device:
            self._put_device(self._device.resolve())
        now = self._time_of(self._clock())
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

    # ---- bookkeeping: everything below runs on the hot path ----

    def _reset(self, now: int) -> None:
        """A new step starts at ``now``; phases under way go on in it."""
        self._began = self._last = now
        self._acc: dict[str, int] = {}
        self._stack = [(name, 0) for name, _ in self._stack]

    def _cut(self) -> int:
        """Gives the time since the last cut to the innermost phase."""
        now = self._clock()
        top = self._top
        self._acc[top] = self._acc.get(top, 0) + now - self._last
        self._last = now
        return now

    def _enter(self, name: str) -> None:
        self._cut()
        if self._stall_depth:
            name = self._top  # within a stall all time is the stall's
        self._stack.append((self._top, self._acc.get(name, 0)))
        self._top = name
        if self._device:
            self._device.mark(name)

    def _leave(self) -> None:
        self._cut()
        name = self._top
        self._top, before = self._stack.pop()
        if name in SAMPLED:
            calls = self._micro.setdefault(name, [])
            if len(calls) < MAX_SAMPLES:
                calls.append((self._acc[name] - before) // 1000)
        if self._device:
            self._device.mark(self._top)

    def _count(self, key: tuple[str, str], nbytes: int, ns: int) -> None:
        entry = self._comm.get(key)
        if entry is None:
            entry = self._comm[key] = [0, 0, 0]
        entry[0] += 1
        entry[1] += nbytes
        entry[2] += ns

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        # A collection in a helper thread does not stop the step's native code; one in autograd's does (the
        # step waits for it). Threads that Python did not start, such as autograd's, are "Dummy-" threads.
        if threading.get_ident() != self._owner and not threading.current_thread().name.startswith("Dummy-"):
            return
        if phase == "start":
            self._gc_t0 = self._clock()
            return
        if not self._gc_t0 or self._stall_depth:
            return
        t0, self._gc_t0 = self._gc_t0, 0
        ns = self._cut() - t0
        self._acc[self._top] -= ns
        self._acc["gc"] = self._acc.get("gc", 0) + ns
        if ns >= GC_STALL_S * 1e9:
            self._put_stall("gc", t0, ns, f"generation {info['generation']}", in_step=True)

    def _put_stall(self, kind: str, t0: int, ns: int, detail: str, *, in_step: bool) -> None:
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
            phases = {name: s for name, s in seconds.items() if not name.startswith(_STALL)}
            self.last_device = DeviceStep(step=step, step_time_s=sum(phases.values()), phases=phases)
            self.put(self.last_device)

    def _time_of(self, mono: int) -> float:
        """Seconds since the epoch of a reading of the clock, to the microsecond."""
        return round(self.info.t0_wall + mono / 1e9 - self.info.t0_mono, 6)


_page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def host_memory() -> Memory:
    """Resident set of this process now and at its highest, in bytes (0 where the system does not tell)."""
    import resource

    # ru_maxrss: KiB on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm", "rb") as f:
            rss = int(f.read().split()[1]) * _page
    except OSError:
        rss = 0
    return Memory(peak=max(peak, rss), rss=rss)
