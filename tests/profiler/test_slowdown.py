"""A run that slows down as a whole, by how much and since when; and one whose batches only get longer."""

from __future__ import annotations

import re

import numpy as np
import pytest

from trainsys.layout import Layout
from trainsys.profiler.blame import Blame, find_blame
from trainsys.profiler.live import EVERY, LiveWatch
from trainsys.profiler.steps import StepTable, empty_table
from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.events import Flops
from trainsys.telemetry.vectors import PLACE, VECTOR

RANKS = 4


def _table(
    level: np.ndarray, seed: int = 0, noise: float = 0.03, flops: np.ndarray | None = None
) -> StepTable:  # type: ignore[type-arg]
    """``level`` [T]: seconds of work of every rank; what is beyond 20 ms the rank waited for a CPU."""
    rng = np.random.default_rng(seed)
    steps = len(level)
    table = empty_table(range(RANKS), np.arange(steps), Layout(dp_shard=RANKS))
    work = level[:, None] * np.exp(noise * rng.normal(size=(steps, RANKS)))
    table.phases = {
        "forward": 0.3 * work,
        "backward": 0.7 * work,
        "comm/fsdp": work.max(axis=1)[:, None] - work + 0.002,
    }
    table.time = np.asarray(sum(table.phases.values()))
    table.work[:] = True
    table.flops_hardware = np.full(steps, 1e9) if flops is None else flops
    table.host["cpu_s"] = np.cumsum(np.minimum(work, 0.020), axis=0)
    table.host["wait_s"] = np.cumsum(np.maximum(work - 0.020, 0.0), axis=0)
    return table


def _steps(*pieces: tuple[int, float]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([np.full(n, seconds) for n, seconds in pieces])


@pytest.mark.parametrize(
    ("pieces", "since", "until"),
    [
        (((120, 0.020), (280, 0.036)), 120, None),
        (((200, 0.020), (200, 0.036)), 200, None),  # at the seam of two windows
        (((60, 0.020), (80, 0.036), (160, 0.020)), 60, 139),
        (((70, 0.036), (330, 0.020)), 0, 69),
    ],
    ids=["lasts", "at a window's seam", "ends", "from the start"],
)
def test_all_ranks_slow_alike_is_a_finding_with_its_cause(
    pieces: tuple[tuple[int, float], ...], since: int, until: int | None
) -> None:
    (found,) = (v for v in find_blame(_table(_steps(*pieces))) if v.kind == "run")
    assert (found.kind, found.ranks, found.cause) == ("run", (), "cpu_contention")
    assert abs(found.since - since) <= 1
    assert found.until is None if until is None else abs((found.until or 0) - until) <= 1
    assert found.cost_s == pytest.approx(0.016, rel=0.1)
    assert re.search(r"(79|80|81)% slower", found.title)
    assert re.search(
        r"^3\d\.\d ms of work .* (19|20)\.\d ms in steps .* waited 1\d\.\d ms more per step", found.evidence
    )


def test_a_run_whose_hosts_counted_nothing_is_slow_for_no_known_reason() -> None:
    """As one of an older version is."""
    table = _table(_steps((120, 0.020), (180, 0.036)))
    table.host = {name: np.zeros_like(values) for name, values in table.host.items()}
    (found,) = (v for v in find_blame(table) if v.kind == "run")
    assert (found.cause, found.since) == ("", 120)
    assert found.evidence.endswith("in steps 0 to 119")


def test_several_slow_spells_are_findings_each() -> None:
    level = _steps((60, 0.020), (40, 0.036), (60, 0.020), (40, 0.030), (60, 0.020))
    found = [v for v in find_blame(_table(level)) if v.kind == "run"]
    assert sorted((v.since // 10, (v.until or 0) // 10) for v in found) == [(6, 9), (16, 19)]


def test_longer_batches_are_no_slowdown() -> None:
    level = _steps((150, 0.020), (150, 0.040))
    assert not [v for v in find_blame(_table(level, flops=level * 5e10)) if v.kind == "run"]
    assert [v for v in find_blame(_table(level)) if v.kind == "run"]


@pytest.mark.parametrize("memory", [0.0, 0.8, 0.95])
def test_healthy_runs_that_drift_are_not_called_slow(memory: float) -> None:
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = np.zeros(400)
        for t in range(1, 400):
            x[t] = memory * x[t - 1] + rng.normal() * np.sqrt(1 - memory**2)
        blame = Blame(400)
        blame.add(_table(0.019 * np.exp(0.05 * x), seed))
        wrong += any(v.kind == "run" for v in blame.verdicts())
    assert wrong <= 1


def test_one_slow_rank_of_two_is_not_the_whole_run() -> None:
    table = _table(np.full(300, 0.02))
    late = np.ones((300, RANKS))
    late[100:, :3] = 1.8
    table.phases = {
        name: values * late if name != "comm/fsdp" else values for name, values in table.phases.items()
    }
    assert not [v for v in find_blame(table) if v.kind == "run"]


def test_it_is_said_live_once_and_when_it_is_over() -> None:
    said: list[Verdict] = []
    watch = LiveWatch(Layout(dp_shard=RANKS), None, said.append, lambda *_: None)
    table = _table(_steps((60, 0.020), (70, 0.036), (62, 0.020)))
    for row in range(len(table.steps)):
        window = np.zeros((RANKS, len(VECTOR)))
        window[:, PLACE["step"]] = row
        window[:, PLACE["step_time_s"]] = table.time[row]
        for name in (*table.phases, "cpu_s", "wait_s"):
            window[:, PLACE[name]] = (table.phases | table.host)[name][row]
        watch.take(window, Flops(1e9))
    watch.close()
    assert [(v.kind, v.news, v.cause) for v in said if v.news != "lasting"] == [
        ("run", "new", "cpu_contention"),
        ("run", "over", "cpu_contention"),
    ]
    assert abs(said[0].since - 60) <= 1
    assert said[-1].until is not None
    assert abs(said[-1].until - 129) <= EVERY
