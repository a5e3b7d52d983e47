"""What a bad loss leads to: the judgement itself, and skip and roll-back in a run of two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.run import ResilienceConfig
from trainsys.errors import UserError
from trainsys.resilience.anomalies import Guard


def guard_of(**fields: Any) -> Guard:
    return Guard(ResilienceConfig(**fields))


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_what_is_no_number_is_never_applied(bad: tuple[float, float], action: str) -> None:
    guard = guard_of(nonfinite=action)
    guard.at(5, 7)
    assert not guard.judge(*bad)
    assert guard.last is not None
    assert (guard.last.step, guard.last.data_step, guard.last.action) == (5, 7, action)
    if action == "stop":
        with pytest.raises(UserError, match=r"step 5 \(batch 7\)"):
            guard.check()
    else:
        guard.check()


def test_a_spike_is_measured_against_the_recent_spread() -> None:
    guard = guard_of(spike=6.0, on_spike="rollback")
    for i in range(20):
        guard.at(i, i)
        assert guard.judge(3.0 + 0.01 * (i % 3), 1.0)
    guard.at(20, 20)
    assert guard.judge(3.05, 1.0), "within the spread"
    guard.at(21, 21)
    assert not guard.judge(3.5, 1.0)
    assert guard.last is not None
    assert guard.last.action == "rollback"
    assert 3.5 not in guard.losses, "a spike does not become the measure of the next"


def test_no_spike_without_history_or_where_it_is_off() -> None:
    guard = guard_of(spike=3.0)
    assert all(guard.judge(x, 1.0) for x in (3.0, 3.0, 9.0))
    off = guard_of()
    assert all(off.judge(x, 1.0) for x in (*[3.0] * 20, 900.0))


@settings(deadline=None)
@given(st.lists(st.floats(1.0, 9.0), min_size=30, max_size=30), st.integers(9, 25))
def test_a_resumed_guard_judges_as_the_one_that_went_on(losses: list[float], cut: int) -> None:
    one, two = guard_of(spike=2.0), guard_of(spike=2.0)
    before = [one.judge(x, 1.0) for x in losses[:cut]]
    two.resume(list(one.losses))
    assert [one.judge(x, 1.0) for x in losses[cut:]] == [two.judge(x, 1.0) for x in losses[cut:]]
    assert len(before) == cut


def test_a_run_that_diverges_ends_and_its_batches_are_on_record(tmp_path: Path) -> None:
    guard = Guard(ResilienceConfig(max_anomalies=2, window=10), tmp_path / "anomalies.jsonl")
    for step in range(2):
        guard.at(step, step)
        guard.judge(math.nan, 1.0)
        guard.record([step, step + 100])
        guard.check()
    guard.at(2, 2)
    guard.judge(math.nan, 1.0)
    with pytest.raises(UserError, match="3 such steps within 10"):
        guard.check()
    lines = [json.loads(line) for line in (tmp_path / "anomalies.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [[0, 100], [1, 101]]
    far = guard_of(max_anomalies=1, window=4)
    for step in (0, 5, 10):
        far.at(step, step)
        far.judge(math.nan, 1.0)
        far.check()
