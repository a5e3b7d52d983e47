"""A run folder's event files, summed up rank by rank in one pass and constant memory a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from trainsys.errors import UserError
from trainsys.telemetry.events import DeviceStep, Flops, RunEnd, RunStart, Stall, Step
from trainsys.telemetry.reader import Damage, iter_events

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

    def add(self, step: Step | DeviceStep, sign: int = 1) -> None:
        self.steps += sign
        self.seconds += sign * step.step_time_s
        self.squares += sign * step.step_time_s**2
        for name, s in step.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + sign * s
        if isinstance(step, DeviceStep):
            return
        self.tokens += sign * step.tokens
        self.padded += sign * step.tokens_padded
        for axis, ops in step.comm.items():
            self.moved[axis] = self.moved.get(axis, 0) + sign * sum(c.bytes for c in ops.values())
        if step.flops is not None:
            self.flops_steps += sign
            self.flops.model += sign * step.flops.model
            for name in ("palm", "hardware"):
                more = getattr(step.flops, name)
                # A count that some steps lack has no mean.
                total = getattr(self.flops, name)
                setattr(self.flops, name, None if more is None or total is None else total + sign * more)

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


def load_run(run_dir: str | Path) -> RunData:
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
        data = load_rank(path, int(digits))
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


def load_rank(path: Path, rank: int) -> RankData:
    """One file's totals."""
    data = RankData(rank, Damage())
    head: list[Step] = []
    device_head: list[DeviceStep] = []
    taken = 0

    def close_attempt() -> None:
        """Takes the attempt's first steps out again, now that its length is known."""
        skip = min(len(head), taken // 4)
        for step in head[:skip]:
            data.work.add(step, -1)
        left_out = {step.step for step in head[:skip]}
        for device_step in device_head:
            if device_step.step in left_out:
                data.device.add(device_step, -1)
        data.warmup += skip
        head.clear()
        device_head.clear()

    for event in iter_events(path, data.damage):
        if isinstance(event, RunStart):
            close_attempt()
            taken = 0
            data.attempts += 1
            if data.start is None:
                data.began_s = event.t0_wall
            data.start, data.end = event, None
            data.seen_s = event.t0_wall
        elif isinstance(event, Step):
            taken += 1
            if len(head) < WARMUP:
                head.append(event)
            data.work.add(event)
            _note(data, event)
        elif isinstance(event, DeviceStep):
            if len(device_head) < WARMUP:
                device_head.append(event)
            data.device.add(event)
        elif isinstance(event, Stall):
            data.seen_s = event.start_s + event.seconds
            if not event.in_step:
                data.stalls[event.kind] = data.stalls.get(event.kind, 0.0) + event.seconds
        elif isinstance(event, RunEnd):
            data.end, data.seen_s = event, event.time_s
    close_attempt()
    return data


def _note(data: RankData, step: Step) -> None:
    data.steps += 1
    data.last_step = max(data.last_step, step.step)
    data.stepping_s += step.step_time_s
    data.seen_s = step.start_s + step.step_time_s + sum(step.stalls.values())
    if step.memory is not None:
        data.peak_memory = max(data.peak_memory, step.memory.peak)
        data.rss = max(data.rss, step.memory.rss)
    if step.loss is None:
        return
    data.last_loss = step.loss
    if not math.isfinite(step.loss):
        data.nonfinite_losses += 1
        return
    if data.first_loss is None:
        data.first_loss = step.loss
    data.best_loss = step.loss if data.best_loss is None else min(data.best_loss, step.loss)
