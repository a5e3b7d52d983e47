"""Of a run's wall time, what made progress, and what took the rest: the parts sum to the wall time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainsys.telemetry.attempts import attempts_of
from trainsys.telemetry.events import RunEnd, Stall
from trainsys.telemetry.reader import Damage, event_file, iter_parts
from trainsys.telemetry.records import Floats, Ints, Records
from trainsys.telemetry.run_data import WARMUP
from trainsys.telemetry.step_columns import by_attempt

BLOCK = 8
"""Steps whose median is one measurement."""
QUICKEST = 0.2
SLOW = 1.2
"""Times a healthy step; less is noise."""


@dataclass(frozen=True)
class Goodput:
    """Seconds of one rank's wall time, first start to last sign of life. ``productive_s + sum(lost) == wall_s``.

    ``lost``: ``restart`` (no process ran), ``lost steps`` (trained again after a restart), ``warm-up`` (first steps'
    excess over the median step), ``slow steps`` (what they took beyond a healthy step of their size), stalls by kind, and
    ``the rest`` (after the loop; what no record claims).
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
    """From one rank's file of each attempt; every rank's wall time is the same but for milliseconds."""
    files = [event_file(attempt, rank) for attempt in attempts_of(run_dir)]
    return account(records for file in files for records, _ in iter_parts(file, Damage()))


@dataclass
class _Attempt:
    begun: float
    seen: float
    steps: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    seconds: Floats = field(default_factory=lambda: np.zeros(0))
    flops: Floats = field(default_factory=lambda: np.zeros(0))
    """0 where a step does not tell."""
    stalls: dict[str, float] = field(default_factory=dict)


def account(parts: Iterable[Records]) -> Goodput:
    """Goodput of a file's records, all attempts."""
    attempts: list[_Attempt] = []
    for records in parts:
        for start, others, steps, _ in by_attempt(records):
            if start is not None:
                attempts.append(_Attempt(start.t0_wall, start.t0_wall))
            if not attempts:
                continue
            now = attempts[-1]
            seconds = steps.of("step_time_s")
            now.steps = np.concatenate((now.steps, steps.step))
            now.seconds = np.concatenate((now.seconds, seconds))
            now.flops = np.concatenate((now.flops, steps.of("flops", "model")))
            now.seen = max([now.seen, *(steps.of("start_s") + seconds + steps.stalled_s).tolist()])
            for event in others:
                if isinstance(event, Stall):
                    now.seen = max(now.seen, event.start_s + event.seconds)
                    if not event.in_step:
                        now.stalls[event.kind] = now.stalls.get(event.kind, 0.0) + event.seconds
                elif isinstance(event, RunEnd):
                    now.seen = max(now.seen, event.time_s)
    if not attempts:
        return Goodput(0.0, 0.0)
    return _sum_up(attempts)


def healthy(seconds: Floats, flops: Floats) -> Floats:
    """[T] -> [T]: what each step would take on a healthy machine; infinite where that cannot be told.

    Blocks of steps have their medians, and healthy is what the quickest fifth of them stay below: a run that is slow for
    most of its time is still seen. It goes with a step's FLOPs where all tell them, but a step smaller than the median
    one may take as long as that: small steps are less efficient.
    """
    if seconds.size < 2 * BLOCK:
        return np.full(seconds.size, np.inf)
    size = np.ones(seconds.size)
    if (flops > 0).all():
        size = np.maximum(1.0, flops / np.median(flops))
        usual = flops >= 0.9 * np.median(flops)
    else:
        usual = np.full(seconds.size, True)
    each = (seconds / size)[usual]
    blocks = np.array_split(each, max(1, each.size // BLOCK))
    return np.asarray(size * np.quantile([np.median(b) for b in blocks], QUICKEST))


def _sum_up(attempts: list[_Attempt]) -> Goodput:
    lost: dict[str, float] = {}
    productive, kept, again = 0.0, 0, 0

    def lose(kind: str, seconds: float) -> None:
        if seconds > 0:
            lost[kind] = lost.get(kind, 0.0) + seconds

    times = np.concatenate([a.seconds for a in attempts])
    typical = float(np.median(times)) if times.size else 0.0
    expected = healthy(times, np.concatenate([a.flops for a in attempts]))
    usual_of = np.split(expected, np.cumsum([a.seconds.size for a in attempts])[:-1])
    for i, (attempt, usual) in enumerate(zip(attempts, usual_of, strict=True)):
        next_first = min((int(a.steps[0]) for a in attempts[i + 1 :] if a.steps.size), default=None)
        stays = np.full(attempt.steps.size, True) if next_first is None else attempt.steps < next_first
        first = np.arange(attempt.steps.size) < min(WARMUP, attempt.steps.size // 4)
        warm = np.where(stays & first, np.maximum(0.0, attempt.seconds - typical), 0.0)
        lose("lost steps", float(attempt.seconds[~stays].sum()))
        lose("warm-up", float(warm.sum()))
        took = attempt.seconds - warm
        slow = np.where(stays & (took > SLOW * usual), took - usual, 0.0)
        lose("slow steps", float(slow.sum()))
        productive += float((took - slow)[stays].sum())
        kept += int(stays.sum())
        again += int((~stays).sum())
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
