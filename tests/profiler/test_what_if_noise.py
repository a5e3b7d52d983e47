"""Somebody is the latest in every step: what equal ranks would "save" is not shown, what a slow one costs is."""

from __future__ import annotations

import numpy as np
import pytest

from trainsys.layout import Layout
from trainsys.profiler.steps import WINDOW, Floats, StepTable, empty_table
from trainsys.profiler.what_if_run import Saved


def _table(ranks: int, steps: int, seed: int, memory: float, noise: float = 0.05) -> tuple[StepTable, Floats]:
    rng = np.random.default_rng(seed)
    x = np.zeros((steps, ranks))
    x[0] = rng.normal(size=ranks)
    for t in range(1, steps):
        x[t] = memory * x[t - 1] + np.sqrt(1 - memory**2) * rng.normal(size=ranks)
    table = empty_table(range(ranks), np.arange(steps), Layout(dp_shard=ranks))
    table.work[:] = True
    return table, 0.02 * np.exp(noise * x)


def _shown(table: StepTable, work: Floats) -> list[tuple[int, float]]:
    table.phases = {"forward": 0.3 * work, "backward": 0.7 * work}
    saved = Saved()
    for rows in np.array_split(np.arange(len(table.steps)), max(1, len(table.steps) // WINDOW)):
        saved.add(table.select(rows))
    return saved.most(table.ranks)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize(("steps", "memory"), [(40, 0.0), (200, 0.0), (200, 0.8), (600, 0.95)])
def test_equal_ranks_show_nothing(ranks: int, steps: int, memory: float) -> None:
    wrong = sum(bool(_shown(*_table(ranks, steps, seed, memory))) for seed in range(100))
    assert wrong <= 2


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("slower", [0.2, 0.5])
def test_a_slow_rank_is_shown_with_what_it_costs(ranks: int, slower: float) -> None:
    for seed in range(20):
        table, work = _table(ranks, 200, seed, 0.3)
        equal = work.max(axis=1).mean()
        work[:, 1] *= 1 + slower
        (rank, saved), *others = _shown(table, work)
        assert (rank, others) == (1, [])
        without = np.delete(work, 1, axis=1).max(axis=1)
        assert saved == pytest.approx(work.max(axis=1).mean() - (equal if ranks == 2 else without.mean()), rel=0.25)
