"""A run folder's event files, summed up rank by rank in one pass and constant memory a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainsys.errors import UserError
from trainsys.telemetry.events import Flops, RunEnd, RunStart, Stall
from trainsys.telemetry.reader import Damage, Place, iter_parts
from trainsys.telemetry.records import Records
from trainsys.telemetry.step_columns import StepColumns, by_attempt

Visit = Callable[[int, Records, Place], None]
"""Is shown all that is read: a rank's records, and where they are."""

WARMUP = 5
"""Steps left out of means at the start of each attempt (compilation, caches, allocator); a quarter of a short
one."""


@dataclass
class Sums:
    """Totals over steps; divide by ``steps``."""

    steps: int = 0
    seconds: float = 0.0
    squares: float = 0.0
    tokens: int = 0
    padded: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    """axis -> bytes."""
    flops: Flops = field(default_factory=lambda: Flops(0.0, 0.0, 0.0))
    flops_steps: int = 0

    def add(self, steps: StepColumns, sign: int = 1) -> None:
        """``sign`` -1 takes them out again."""
        seconds = steps.of("step_time_s")
        self.steps += sign * len(steps)
        self.seconds += sign * float(seconds.sum())
        self.squares += sign * float((seconds**2).sum())
        for name, values in steps.named("phases").items():
            self.phases[name] = self.phases.get(name, 0.0) + sign * float(values.sum())
        self.tokens += sign * int(steps.of("tokens").sum())
        self.padded += sign * int(steps.of("tokens_padded").sum())
        for axis, moved in steps.nbytes.items():
            self.moved[axis] = self.moved.get(axis, 0) + sign * int(moved.sum())
        counted = steps.cut(steps.has("flops", "model"))
        self.flops_steps += sign * len(counted)
        self.flops.model += sign * float(counted.of("flops", "model").sum())
        for name in ("palm", "hardware"):
            # A count that some steps lack has no mean.
            total = getattr(self.flops, name)
            known = total is not None and bool(counted.has("flops", name).all())
            setattr(self.flops, name, total + sign * float(counted.of("flops", name).sum()) if known else None)

    @property
    def mean_s(self) -> float:
        return self.seconds / self.steps if self.steps else math.nan

    @property
    def spread_s(self) -> float:
        """Standard deviation of a step."""
        if self.steps < 2:
            return 0.0
        return math.sqrt(max(0.0, self.squares / self.steps - self.mean_s**2))


@dataclass
class RankData:
    """One rank's file. ``work`` leaves out the warm-up, the other totals do not."""

    rank: int
    damage: Damage
    start: RunStart | None = None
    end: RunEnd | None = None
    attempts: int = 0
    steps: int = 0
    last_step: int = -1
    warmup: int = 0
    work: Sums = field(default_factory=Sums)
    device: Sums = field(default_factory=Sums)
    stepping_s: float = 0.0
    """Seconds in steps, warm-up included."""
    stalls: dict[str, float] = field(default_factory=dict)
    """Seconds outside steps, by kind."""
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    nonfinite_losses: int = 0
    peak_memory: int = 0
    rss: int = 0
    began_s: float = math.nan
    seen_s: float = math.nan
    """Time of day of the first attempt's start, and of the last record."""


@dataclass
class RunData:
    """All of a run that its files tell."""

    run_dir: Path
    ranks: dict[int, RankData]
    start: RunStart
    missing: list[int]
    """Ranks of the world that left no usable file."""

    @property
    def damages(self) -> list[Damage]:
        return [r.damage for r in self.ranks.values() if r.damage]

    @property
    def lead(self) -> RankData:
        """Rank 0, or the lowest rank there is: whose loss and clock are told."""
        return self.ranks[min(self.ranks)]

    @property
    def status(self) -> str:
        """done, stopped, failed, or killed (some rank has no last record)."""
        ends = [r.end for r in self.ranks.values()]
        if any(e is not None and e.status == "failed" for e in ends):
            return "failed"
        if any(e is None for e in ends):
            return "killed"
        return "stopped" if any(e is not None and e.status == "stopped" for e in ends) else "done"

    @property
    def reason(self) -> str:
        """Why it failed or stopped, in the words of the lowest rank that said so."""
        for rank, data in sorted(self.ranks.items()):
            if data.end is not None and data.end.status != "done" and data.end.reason:
                return f"rank {rank}: {data.end.reason}"
        return ""


def load_run(run_dir: str | Path, visit: Visit = lambda rank, records, place: None) -> RunData:
    """Reads every rank's events. Raises ``UserError`` where there is no run at all."""
    run_dir = Path(run_dir)
    files = sorted((run_dir / "events").glob("rank_*.jsonl")) if run_dir.is_dir() else []
    if not files:
        raise UserError(
            f"{run_dir}: no run here (no events/rank_*.jsonl); name a run's folder, such as runs/latest"
        )
    ranks: dict[int, RankData] = {}
    for path in files:
        digits = path.stem.removeprefix("rank_")
        if not digits.isdecimal():
            continue
        data = load_rank(path, int(digits), visit)
        if data.start is not None or data.steps:
            ranks[data.rank] = data
    starts = [r.start for _, r in sorted(ranks.items()) if r.start is not None]
    if not starts:
        raise UserError(
            f"{run_dir}: no usable record in {len(files)} event files; the run left nothing to read"
        )
    start = starts[0]
    missing = [rank for rank in range(start.world) if rank not in ranks]
    return RunData(run_dir, ranks, start, missing)


def load_rank(path: Path, rank: int, visit: Visit = lambda rank, records, place: None) -> RankData:
    """One file's totals."""
    data = RankData(rank, Damage())
    warm_up = _WarmUp(data)
    for records, place in iter_parts(path, data.damage):
        visit(rank, records, place)
        for start, others, steps, device in by_attempt(records):
            if start is not None:
                warm_up.close()
                data.attempts += 1
                if data.start is None:
                    data.began_s = start.t0_wall
                data.start, data.end = start, None
                data.seen_s = start.t0_wall
            warm_up.add(steps, device)
            data.device.add(device)
            if len(steps):
                data.work.add(steps)
                _note(data, steps)
            for event in others:
                if isinstance(event, Stall):
                    data.seen_s = max(data.seen_s, event.start_s + event.seconds)
                    if not event.in_step:
                        data.stalls[event.kind] = data.stalls.get(event.kind, 0.0) + event.seconds
                elif isinstance(event, RunEnd):
                    data.end, data.seen_s = event, event.time_s
    warm_up.close()
    return data


class _WarmUp:
    """An attempt's first steps, which are taken out of ``work`` once its length is known."""

    def __init__(self, data: RankData) -> None:
        self._data = data
        self._head: list[StepColumns] = []
        self._device: list[StepColumns] = []
        self._taken = 0

    def add(self, steps: StepColumns, device: StepColumns) -> None:
        for head, more in ((self._head, steps), (self._device, device)):
            if left := WARMUP - sum(map(len, head)):
                head.append(more.cut(slice(left)))
        self._taken += len(steps)

    def close(self) -> None:
        skip = min(WARMUP, self._taken // 4)
        self._data.warmup += skip
        left_out: list[int] = []
        for steps in self._head:
            first = steps.cut(slice(max(0, skip - len(left_out))))
            self._data.work.add(first, -1)
            left_out += first.step.tolist()
        for device in self._device:
            self._data.device.add(device.cut(np.isin(device.step, left_out)), -1)
        self._head, self._device, self._taken = [], [], 0


def _note(data: RankData, steps: StepColumns) -> None:
    seconds = steps.of("step_time_s")
    data.steps += len(steps)
    data.last_step = max(data.last_step, int(steps.step.max()))
    data.stepping_s += float(seconds.sum())
    data.seen_s = max(data.seen_s, float((steps.of("start_s") + seconds + steps.stalled_s)[-1]))
    data.peak_memory = max(data.peak_memory, int(steps.of("memory", "peak").max()))
    data.rss = max(data.rss, int(steps.of("memory", "rss").max()))
    losses = steps.cut(steps.has("loss")).of("loss")
    if not losses.size:
        return
    data.last_loss = float(losses[-1])
    finite = losses[np.isfinite(losses)]
    data.nonfinite_losses += losses.size - finite.size
    if finite.size:
        data.first_loss = float(finite[0]) if data.first_loss is None else data.first_loss
        data.best_loss = min(float(finite.min()), math.inf if data.best_loss is None else data.best_loss)
