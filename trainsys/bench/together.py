"""The same work on N processes at once, timed on one clock.

A ceiling is what all processes reach *together*: four on two cores get half each, and memory is shared.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError

import numpy as np
import torch

from trainsys.errors import UserError
from trainsys.hardware.measured import usable_cores

# Shortest stretch that is timed on a device, so that launching and waiting are small beside it.
_DEVICE_STRETCH_S = 5e-3
_MIN_CALLS = 4
_FASTEST = 0.95
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Work:
    """One repeatable call and how much it does: FLOPs, or bytes moved."""

    run: Callable[[], object]
    amount: float


@dataclass(frozen=True)
class Stamps:
    """One process's progress: the clock at the start and after each stretch of calls, each of ``amount``."""

    times_s: list[float]
    amount: float


@dataclass(frozen=True)
class _Failure:
    error: str
    follows: bool
    """Whether it only follows from another process's."""


MakeWork = Callable[[int, torch.device], Work]
"""(index of the variant, device) -> the work; importable by name, since it is sent to other processes."""


def refuse(what: str, processes: int, threads: int, seconds: float, device: str) -> None:
    """UserError for what cannot be measured here; ``what`` names the measurement."""
    if processes < 1 or threads < 1 or seconds <= 0:
        raise UserError(f"{what}: processes, threads and seconds must be positive")
    if device not in ("cpu", "cuda"):
        raise UserError(f"{what}: device {device!r} is not known; one of cpu, cuda")
    if device == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{what}: {processes} processes, one a GPU, but torch sees {torch.cuda.device_count()}; "
            "lower the count or measure with device cpu"
        )


def threads_each(processes: int, threads: int | None) -> int:
    """``threads``, or where it is None the usable cores / processes, at least 1, as a run has."""
    return max(1, usable_cores() // max(1, processes)) if threads is None else threads


def repeat(work: Work, seconds: float, device: torch.device) -> Stamps:
    """Repeat the work for about ``seconds``, and at least a few times."""
    return _on_device(work, seconds) if device.type == "cuda" else _on_cpu(work, seconds)


def _on_cpu(work: Work, seconds: float) -> Stamps:
    times = [time.monotonic()]
    while len(times) <= _MIN_CALLS or times[-1] < times[0] + seconds:
        work.run()
        times.append(time.monotonic())
    return Stamps(times, work.amount)


def _on_device(work: Work, seconds: float) -> Stamps:
    def stretch(calls: int) -> torch.cuda.Event:
        for _ in range(calls):
            work.run()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no hints here
        event.record()
        event.synchronize()
        return event

    first = stretch(1)
    once_s = first.elapsed_time(stretch(4)) / 1e3 / 4
    calls = max(1, round(_DEVICE_STRETCH_S / max(once_s, 1e-7)))
    start = stretch(1)
    times = [time.monotonic()]
    while len(times) <= _MIN_CALLS or times[-1] < times[0] + seconds:
        times.append(times[0] + start.elapsed_time(stretch(calls)) / 1e3)
    return Stamps(times, work.amount * calls)


def fastest_rate(stamps: Stamps) -> float:
    """Amount a second that one process reaches in the fastest twentieth of its stretches.

    What else runs on the machine only ever makes a stretch longer: a mean or median over wall time is that load's as much
    as the hardware's. Stretches have to be short beside the scheduler's time slices (milliseconds) for some to be whole.
    """
    return float(np.quantile(stamps.amount / np.diff(stamps.times_s), _FASTEST))


def combined_rate(stamps: Sequence[Stamps], bins: int = 10) -> float:
    """Amount a second of all processes together: the median over ``bins`` slices of the time all were at work.

    A call that spans slices counts in each by its share. The median leaves out slices in which something
    else ran.
    """
    start = max(s.times_s[0] for s in stamps)
    end = min(s.times_s[-1] for s in stamps)
    assert end > start, "no moment at which every process was at work"
    edges = np.linspace(start, end, bins + 1)
    done = np.zeros(bins + 1)
    for s in stamps:
        done += np.interp(edges, s.times_s, np.arange(len(s.times_s)) * s.amount)
    return float(np.median(np.diff(done) / np.diff(edges)))


def _child(
    make: MakeWork,
    variants: int,
    threads: int,
    seconds: float,
    device: str,
    barrier: Barrier,
    out: Connection,
) -> None:
    try:
        torch.set_num_threads(threads)
        on = torch.device(device)
        if on.type == "cuda":
            torch.cuda.set_device(on)
        for variant in range(variants):
            work = make(variant, on)
            work.run()
            barrier.wait(_PATIENCE_S)
            out.send(repeat(work, seconds, on))
    except BaseException as error:
        # Said before the others are let go from the barrier, whose own errors only follow from this one.
        out.send(_Failure(f"{type(error).__name__}: {error}", isinstance(error, BrokenBarrierError)))
        barrier.abort()


def run_together(
    make: MakeWork, variants: int, *, processes: int, threads: int, seconds: float, device: str
) -> list[list[Stamps]]:
    """Stamps by [variant][process]; on CUDA process i has device i.

    Raises:
        RuntimeError: a process failed or died; says which and why.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    barrier = context.Barrier(processes)
    children, pipes = [], []
    for i in range(processes):
        receive, send = context.Pipe(duplex=False)
        on = f"cuda:{i}" if device == "cuda" else device
        args = (make, variants, threads, seconds, on, barrier, send)
        child = context.Process(target=_child, args=args, daemon=True)
        child.start()
        send.close()
        children.append(child)
        pipes.append(receive)
    try:
        by_process = _collect(pipes, variants)
    finally:
        for child in children:
            child.join(1.0)
            child.kill()
            child.join()
    return [[stamps[variant] for stamps in by_process] for variant in range(variants)]


def _collect(pipes: list[Connection], variants: int) -> list[list[Stamps]]:
    """All stamps by [process][variant], listening to every process at once: any may be the one that fails."""
    got: list[list[Stamps]] = [[] for _ in pipes]
    while unfinished := [pipe for pipe, stamps in zip(pipes, got, strict=True) if len(stamps) < variants]:
        ready = wait(unfinished, _PATIENCE_S)
        failures: list[tuple[bool, int, str]] = [] if ready else [(False, 0, "no answer")]
        for i, pipe in enumerate(pipes):
            while pipe in ready and len(got[i]) < variants and pipe.poll():
                try:
                    message = pipe.recv()
                except EOFError:
                    message = _Failure("died", False)
                if isinstance(message, _Failure):
                    failures.append((message.follows, i, message.error))
                    break
                got[i].append(message)
        if failures:
            _, process, error = min(failures)
            raise RuntimeError(f"bench process {process}: {error}")
    return got
