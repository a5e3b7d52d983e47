"""Goodput: a slow stretch makes no more progress than a quick one; what it took beyond is lost, and the parts sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from trainsys.profiler.goodput import Goodput, account
from trainsys.telemetry.events import Event, Flops, RunEnd, RunStart, Step
from trainsys.telemetry.records import gathered

STEPS = 400


def _good(seconds: np.ndarray, flops: np.ndarray | None = None) -> Goodput:  # type: ignore[type-arg]
    events: list[Event] = [RunStart(run_id="r", rank=0, world=1, t0_wall=100.0, t0_mono=0.0)]
    now = 100.0
    for i, s in enumerate(seconds.tolist()):
        told = None if flops is None else Flops(float(flops[i]))
        events.append(Step(step=i, start_s=now, step_time_s=s, phases={"forward": s}, flops=told))
        now += s
    events.append(RunEnd(status="done", time_s=now, step=len(seconds) - 1))
    return account([gathered(events)])


def _noisy(level: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    level = np.asarray(level, float)
    return np.asarray(level * np.exp(0.05 * np.random.default_rng(seed).normal(size=level.size)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("spread", ["a stretch", "now and then"])
def test_what_slow_steps_took_beyond_a_healthy_one_is_lost(share: float, spread: str) -> None:
    slow = np.arange(STEPS) >= STEPS * (1 - share)
    if spread == "now and then":
        slow = np.arange(STEPS) // 10 % 10 >= 10 * (1 - share)  # ten steps at a time
    good = _good(_noisy(np.where(slow, 0.3, 0.1)))
    assert good.lost["slow steps"] == pytest.approx(0.2 * slow.sum(), rel=0.05)
    assert good.productive_s == pytest.approx(0.1 * STEPS, rel=0.05)
    assert good.productive_s + sum(good.lost.values()) == pytest.approx(good.wall_s, abs=1e-6)


def test_noise_is_not_lost() -> None:
    good = _good(_noisy(np.full(STEPS, 0.1)))
    assert good.lost.get("slow steps", 0.0) < 0.005 * good.wall_s


@pytest.mark.parametrize(
    "flops",
    [
        np.where(np.arange(STEPS) < 150, 1e9, np.where(np.arange(STEPS) < 250, 2e9, 4e9)),  # longer sequences by and by
        np.random.default_rng(1).uniform(0.5e9, 2e9, STEPS),  # documents
    ],
    ids=["warm-up of the length", "documents"],
)
def test_larger_batches_are_not_slow(flops: np.ndarray) -> None:  # type: ignore[type-arg]
    seconds = _noisy(0.03 + 1e-10 * flops)  # part of a step does not go with its size
    assert _good(seconds, flops).lost.get("slow steps", 0.0) < 0.02 * seconds.sum()
    slow = seconds * np.where(np.arange(STEPS) % 100 < 30, 3.0, 1.0)
    assert _good(slow, flops).lost["slow steps"] == pytest.approx(slow.sum() - seconds.sum(), rel=0.15)


def test_a_short_run_is_not_judged() -> None:
    assert "slow steps" not in _good(np.array([0.1, 0.1, 0.3, 0.1, 0.3, 0.1])).lost
