"""Scores by hand on small groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.planner.metrics import balanced_accuracy, mape, median_error, ranks, score_groups, spearman


def test_errors_by_hand() -> None:
    predicted, measured = np.array([1.1, 1.8, 3.0]), np.array([1.0, 2.0, 2.0])
    assert mape(predicted, measured) == pytest.approx((10 + 10 + 50) / 3)
    assert median_error(predicted, measured) == pytest.approx(10)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30, unique=True))
def test_spearman_sees_only_order(values: list[float]) -> None:
    x = np.asarray(values)
    assert spearman(x, np.arange(len(x))[np.argsort(np.argsort(x))]) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)


def test_spearman_averages_ties() -> None:
    assert ranks(np.array([5.0, 7, 7, 9])).tolist() == [1, 2.5, 2.5, 4]
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_balanced_accuracy_weighs_both_sides_alike() -> None:
    truth = np.array([True] * 10 + [False] * 90)
    assert balanced_accuracy(np.zeros(100, bool), truth) == 50.0
    assert balanced_accuracy(truth, truth) == 100.0
    assert np.isnan(balanced_accuracy(truth[:10], truth[:10]))


def _scores(predicted: list[float], measured: list[float], oom: list[bool], called: list[bool]):  # type: ignore[no-untyped-def]
    n = len(predicted)
    return score_groups(
        ["g"] * n, list(range(n)), np.array(predicted), np.array(measured), np.array(oom), np.array(called),
        np.arange(n, dtype=float),
    )  # fmt: skip


def test_regret_of_the_first_pick_that_fits() -> None:
    nan = float("nan")
    measured = [nan, 1.2, 1.0, 2, 3, 4, 5, 6]
    oom = [True] + [False] * 7
    predicted = [0.5, 1.0, 1.1, 2, 3, 4, 5, 6]
    (s,) = _scores(predicted, measured, oom, [True] + [False] * 7)
    assert s.regret == pytest.approx(20)
    assert not s.pick_oom
    (s,) = _scores(predicted, measured, oom, [False] * 8)
    assert s.pick_oom
    assert s.regret == pytest.approx(20), "the regret is that of the next pick that ran"
    (s,) = _scores(predicted, measured, oom, [True, True] + [False] * 6)
    assert s.regret == pytest.approx(0)


def test_groups_need_eight_distinct_layouts() -> None:
    values = [float(i + 1) for i in range(8)]
    assert len(_scores(values, values, [False] * 8, [False] * 8)) == 1
    same = score_groups(
        ["g"] * 8,
        [0] * 8,
        np.array(values),
        np.array(values),
        np.zeros(8, bool),
        np.zeros(8, bool),
        np.zeros(8),
    )
    assert same == []
