"""Event files of a made-up run as a recorder would write them: pipeline, tensor and sharded-data ranks, with noise.

Everything goes through a real ``Recorder`` on a clock of its own, so phases, collectives, calls, memory, FLOPs and MFU
are what a training run has, at any speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from trainsys.layout import Layout
from trainsys.telemetry.events import Event, Flops, Memory, RunStart
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.recorder import Recorder
from trainsys.telemetry.tail import path_of

PAGE = 4096


class Run:
    """``micro`` micro-batches per step of about ``micro * 30`` ms, each span 6% (one standard deviation) longer or
    shorter, one in 200 several times as long."""

    def __init__(
        self, layout: Layout, micro: int = 4, seed: int = 0, packed: bool = False, device: bool = False,
        slow: int | None = None, peak: float = 9.89e14, source: Literal["", "catalogue", "measured"] = "",
    ) -> None:  # fmt: skip
        """``packed``: rows of documents, whose attention varies; ``device``: a device's clock as well, a little behind;
        ``slow``: a rank whose compute takes a third longer; ``peak``: FLOP/s of a rank, and its ``source``."""
        self.layout, self.micro, self.seed, self.packed, self.device = layout, micro, seed, packed, device
        self.slow, self.peak, self.source = slow, peak, source

    def info(self, rank: int, first_step: int = 0, attempt: int = 0) -> RunStart:
        layout = self.layout
        axes = {a: getattr(layout, a) for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
        return RunStart(
            run_id="made", rank=rank, world=layout.world, t0_wall=1.79e9, t0_mono=10.0, name="made", layout=axes,
            coords=dict(layout.coords(rank)), hostname=f"node{rank // 8}", peak_flops=self.peak, peak_label="of a test",
            peak_source=self.source, first_step=first_step,
            attempt=attempt,
        )  # fmt: skip

    def record(self, folder: Path | None, rank: int, steps: range, attempt: int = 0) -> Iterator[Event]:
        """Records ``steps`` of one rank, and ends its file if the iterator is exhausted."""
        rng = np.random.default_rng([self.seed, rank, attempt])
        shared = np.random.default_rng([self.seed, 99, attempt])
        now = 10_000_000_000 + attempt * 10**13
        rss = 6 << 30

        def clock() -> int:
            return now

        def memory() -> Memory:
            nonlocal rss
            rss += PAGE * int(rng.integers(0, 3))
            return Memory(allocated=31 << 30, reserved=60 << 30, peak=52 << 30, rss=rss)

        info = self.info(rank, steps.start, attempt)
        info.t0_mono = now / 1e9
        info.t0_wall += attempt * 1e4
        timer = _Device(clock, rng) if self.device else None
        rec = Recorder(folder, info, clock=clock, memory=memory, watch_gc=False, timer=timer)
        lag = 1.33 if rank == self.slow else 1.0
        now += 3_000_000_000
        rec.begin()
        spans = 8 * self.micro + 8
        for step in steps:
            noise = np.maximum(0.2, 1 + 0.06 * rng.normal(size=spans))
            noise[rng.random(spans) < 0.005] *= 4
            took = iter((noise * 1e6).tolist())

            def work(ms: float, took: Iterator[float] = took) -> None:
                nonlocal now
                now += int(ms * next(took))

            with rec.phase("data"):
                work(0.4)
            for phase, times in (("forward", 1), ("backward", 2)):
                for _ in range(self.micro):
                    with rec.phase(phase):
                        work(7.0 * times * lag)
                        if self.layout.tp > 1:
                            with rec.collective_span("tp", "all_gather", 1 << 24):
                                work(1.1)
                        if self.layout.pp > 1:
                            with rec.collective_span("pp", "recv", 1 << 23):
                                work(0.8)
                    with rec.collective_span("fsdp", "all_gather" if times == 1 else "reduce_scatter", 3 << 24):
                        work(2.2)
            with rec.phase("optimizer"):
                work(6.0)
            with rec.collective_span("world", "all_reduce", 18):
                work(0.5)
            if step % 500 == 499:
                with rec.stall("checkpoint"):
                    work(900.0)
            work(0.3)
            pairs = int(shared.integers(1 << 24, 1 << 25)) if self.packed else 1 << 25
            loss = float(np.float32(8 * (step + 1) ** -0.1 + 0.05 * shared.normal()))
            norm = float(np.float32(0.4 + 0.05 * abs(shared.normal())))
            yield rec.end_step(
                step, tokens=8192, attn_pairs=pairs if self.packed else 1 << 25, loss=loss, grad_norm=norm,
                lr=float(3e-4 * 0.5 * (1 + np.cos(np.pi * step / 100_000))),
                flops=Flops(1.2e15 + 12288.0 * pairs, 1.5e15, 1.6e15 + 16384.0 * pairs),
            )  # fmt: skip
        rec.finish("done")


class _Device:
    """Marks a little behind the host; a step is read when the next but one has ended."""

    def __init__(self, clock: Callable[[], int], rng: np.random.Generator) -> None:
        self._clock, self._rng = clock, rng

    def mark(self) -> int:
        return self._clock() + 40_000 + int(self._rng.integers(0, 20_000))

    def elapsed(self, first: int, last: int) -> float | None:
        return None if last > self._clock() - 20_000_000 else max(0, last - first) / 1e9

    def recycle(self, handles: Sequence[int]) -> None:
        pass

    def marks(self, stream: Any) -> bool:
        return True


def as_lines(path: Path) -> None:
    """Writes a rank's file again as version 1 had it: all records as JSON lines."""
    events, damage = read_events(path)
    assert not damage
    lines = [msgspec.json.encode(event).replace(b'"schema":"2.0"', b'"schema":"1.0"') for event in events]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    path_of(path).unlink(missing_ok=True)


def copies(run: Run, folder: Path, ranks: int, steps: int) -> None:
    """A run of so many ranks that all did what rank 0 did: quick to make, and as large as any."""
    for _ in run.record(folder, 0, range(steps)):
        pass
    first = event_file(folder, 0).read_bytes()
    for rank in range(1, ranks):
        event_file(folder, rank).write_bytes(first.replace(b'"rank":0', b'"rank":%d' % rank, 1))
