"""What a running job is told of a finding, and when; by looks at made verdicts, and by the watch on made windows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainsys.profiler.findings import LASTING, Findings
from trainsys.profiler.live import EVERY, LEAST, WARM_UP
from trainsys.profiler.verdict import Verdict

sys.path.append(str(Path(__file__).resolve().parents[2] / "profiling"))
from blame_noise import accused, detection, watched

SLOW = Verdict("rank", "rank 1 computes slowly", "", "", 0.010, 0.1, (1,), "compute", 12)


def told(looks: list[list[Verdict]]) -> list[list[tuple[str, int | None]]]:
    findings = Findings()
    return [
        [(v.news, v.until) for v in findings.look(found, EVERY * (i + 1), 100 * (i + 1))]
        for i, found in enumerate(looks)
    ]


def test_said_once_then_that_it_lasts() -> None:
    said = told([[SLOW]] * 10)
    assert said[0] == [("new", None)]
    later = [(i, news) for i, news in enumerate(said) if news and i]
    assert later == [(LASTING // EVERY, [("lasting", None)])]


def test_again_when_it_costs_twice_as_much() -> None:
    findings = Findings()
    costs = (0.010, 0.015, 0.021, 0.030, 0.044)
    news = [[(v.news, v.cost_s, v.since) for v in findings.look([replace(SLOW, cost_s=c, since=50)], 8 * i, i)]
            for i, c in enumerate(costs)]  # fmt: skip
    assert news == [[("new", 0.010, 50)], [], [("worse", 0.021, 50)], [], [("worse", 0.044, 50), ("lasting", 0.044, 50)]]


def test_its_end_and_a_relapse_are_said() -> None:
    ended = replace(SLOW, until=130)
    assert told([[SLOW], [ended], [ended], [SLOW]]) == [[("new", None)], [("over", 130)], [], [("new", None)]]
    assert told([[SLOW], [], [SLOW], [], [], []])[1:] == [[], [], [], [("over", 500)], []], "one look may miss it"


def test_what_came_and_went_between_two_looks_is_said_once() -> None:
    assert told([[replace(SLOW, until=90)]] * 3) == [[("new", 90)], [], []]


def test_warm_up_accuses_nobody_and_a_fault_is_followed_to_its_end() -> None:
    rng = np.random.default_rng(0)
    factor = np.ones((160, 4))
    factor[:WARM_UP, 2] = 20
    assert watched(0.1 * factor * np.exp(rng.normal(0, 0.01, factor.shape))) == []
    factor[20:110, 1] = 1.3
    found = [v for _, v in watched(0.1 * factor * np.exp(rng.normal(0, 0.01, factor.shape)), ["a", "b"] * 2)]
    assert [(v.news, v.ranks) for v in found] == [("new", (1,)), ("lasting", (1,)), ("over", (1,))]
    assert abs(found[0].since - 20) <= 1
    assert found[-1].until is not None
    assert abs(found[-1].until - 109) <= 2
    assert "rank 1 on b" in found[0].title


def test_a_slow_node_is_one_finding_while_it_runs() -> None:
    rng = np.random.default_rng(1)
    factor = np.ones((LEAST + WARM_UP + EVERY, 16))
    factor[:, 4:8] = 1.3
    hosts = [f"node{rank // 4}" for rank in range(16)]
    found = watched(0.1 * factor * np.exp(rng.normal(0, 0.01, factor.shape)), hosts)
    assert [(v.kind, v.ranks) for _, v in found] == [("node", (4, 5, 6, 7))]


@pytest.mark.parametrize("kind", ["independent", "0.8", "0.95"])
def test_healthy_runs_of_drifting_ranks_are_left_alone(kind: str) -> None:
    """Forty runs with 5% of noise; the long form is profiling/blame_noise.py."""
    assert accused(4, kind, 0.05, runs=40) <= 0.05


def test_a_slow_rank_is_found_in_time_and_no_other_is_named() -> None:
    found = detection(8, "independent", 0.2, runs=10)
    assert (found["named"], found["no_other_named"]) == (1.0, 1.0)
    assert found["windows_of_nine_in_ten"] is not None
    assert found["windows_of_nine_in_ten"] <= 24
