"""Of a run's wall time, what made progress, and what took the rest: the parts sum to the wall time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainsys.telemetry.events import AnyEvent, RunEnd, RunStart, Stall, Step
from trainsys.telemetry.reader import Damage, event_file, iter_events
from trainsys.telemetry.run_data import WARMUP


@dataclass(frozen=True)
class Goodput:
    """Seconds of one rank's wall time, first start to last sign of life. ``productive_s + sum(lost) == wall_s``.

    ``lost``: ``restart`` (no process ran), ``lost steps`` (trained again after a restart), ``warm-up`` (first steps'
    excess over the median step), stalls by kind, and ``the rest`` (after the loop; what no record claims).
    """

    wall_s: float
    productive_s: float
    lost: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    lost_steps: int = 0
    attempts: int = 0

    @property
    def share(self) -> float:
        """Goodput, 0..1."""
        return self.productive_s / self.wall_s if self.wall_s > 0 else 0.0


def goodput_of(run_dir: str | Path, rank: int) -> Goodput:
    """From one rank's file; every rank's wall time is the same but for milliseconds."""
    return account(iter_events(event_file(run_dir, rank), Damage()))


@dataclass
class _Attempt:
    begun: float
    seen: float
    steps: list[tuple[int, float]] = field(default_factory=list)
    stalls: dict[str, float] = field(default_factory=dict)


def account(events: Iterable[AnyEvent]) -> Goodput:
    """Goodput of a file's records, all attempts."""
    attempts: list[_Attempt] = []
    for event in events:
        if isinstance(event, RunStart):
            attempts.append(_Attempt(event.t0_wall, event.t0_wall))
            continue
        if not attempts:
            continue
        now = attempts[-1]
        if isinstance(event, Step):
            now.steps.append((event.step, event.step_time_s))
            now.seen = max(now.seen, event.start_s + event.step_time_s + sum(event.stalls.values()))
        elif isinstance(event, Stall):
            now.seen = max(now.seen, event.start_s + event.seconds)
            if not event.in_step:
                now.stalls[event.kind] = now.stalls.get(event.kind, 0.0) + event.seconds
        elif isinstance(event, RunEnd):
            now.seen = max(now.seen, event.time_s)
    if not attempts:
        return Goodput(0.0, 0.0)
    return _sum_up(attempts)


def _sum_up(attempts: list[_Attempt]) -> Goodput:
    lost: dict[str, float] = {}
    productive, kept, again = 0.0, 0, 0

    def lose(kind: str, seconds: float) -> None:
        if seconds > 0:
            lost[kind] = lost.get(kind, 0.0) + seconds

    times = [s for a in attempts for _, s in a.steps]
    typical = float(np.median(times)) if times else 0.0
    for i, attempt in enumerate(attempts):
        next_first = min((a.steps[0][0] for a in attempts[i + 1 :] if a.steps), default=None)
        for place, (step, seconds) in enumerate(attempt.steps):
            if next_first is not None and step >= next_first:
                lose("lost steps", seconds)
                again += 1
                continue
            warm = max(0.0, seconds - typical) if place < min(WARMUP, len(attempt.steps) // 4) else 0.0
            lose("warm-up", warm)
            productive += seconds - warm
            kept += 1
        for kind, seconds in attempt.stalls.items():
            lose(kind, seconds)
        if i + 1 < len(attempts):
            lose("restart", attempts[i + 1].begun - attempt.seen)
    wall = max(a.seen for a in attempts) - attempts[0].begun
    rest = wall - productive - sum(lost.values())
    if rest > 0:
        lost["the rest"] = rest
    elif rest < 0:  # clocks of two attempts on two hosts may overlap
        wall -= rest
    return Goodput(wall, productive, dict(sorted(lost.items(), key=lambda kv: -kv[1])), kept, again, len(attempts))
