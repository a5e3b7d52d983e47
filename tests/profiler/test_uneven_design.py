"""Pipeline stages that are uneven by the config are named as design; a slow stage on top of that as hardware."""

from __future__ import annotations

import numpy as np
import pytest

from trainsys.config.loader import load_run
from trainsys.layout import Layout
from trainsys.profiler.blame import judge_window
from trainsys.profiler.expected import StageWork, stage_work
from trainsys.profiler.steps import StepTable, empty_table

PP, EACH, STEPS = 4, 2, 60


def _run(seed: int, each: int = EACH) -> tuple[StepTable, StageWork]:
    """A pipeline of 4 stages whose layers do not divide; each stage's work is its FLOPs, 3% noise, 10% beside them."""
    rng = np.random.default_rng(seed)
    asked = (f"parallel.pp={PP}", f"model.n_layers={int(rng.choice([5, 6, 7, 9, 10, 11]))}",
             f"model.vocab={int(rng.choice([1024, 32768, 131072]))}", "parallel.pipeline.schedule=1f1b")  # fmt: skip
    work = stage_work(load_run("train/llama3-8b", asked), PP)
    assert work is not None
    table = empty_table(range(PP * each), np.arange(STEPS), Layout(pp=PP, dp_shard=each))
    shape = (STEPS, PP * each)
    busy = 0.1 * (np.repeat(work.share, each) + 0.1)
    for name, part in (("forward", 1 / 3), ("backward", 2 / 3)):
        table.phases[name] = part * busy * np.exp(0.03 * rng.normal(size=shape))
    _finish(table)
    table.stages = work
    return table, work


def _finish(table: StepTable) -> None:
    busy = table.phases["forward"] + table.phases["backward"]
    table.phases["comm/pp"] = busy.max(axis=1)[:, None] - busy + 0.001
    table.time = busy + table.phases["comm/pp"]
    table.work[:] = True


def _slow(table: StepTable, columns: slice) -> None:
    for name in ("forward", "backward"):
        table.phases[name][20:, columns] *= 1.4
    _finish(table)


@pytest.mark.parametrize("seed", range(40))
def test_uneven_stages_are_design(seed: int) -> None:
    table, work = _run(seed)
    found = judge_window(table)
    assert all(v.kind == "stage" and not v.ranks for v in found), found
    fullest = int(work.share.argmax())
    if work.share[fullest] > 1.1 * np.delete(work.share, fullest).max():
        (verdict,) = found
        assert verdict.phase == f"stage {fullest}"
        assert "parallel.pp" in verdict.advice


def test_a_slow_stage_on_top_is_hardware() -> None:
    right = []
    for seed in range(40):
        table, work = _run(seed)
        stage = int(work.share.argmax())
        _slow(table, slice(EACH * stage, EACH * (stage + 1)))
        right.append([v.ranks for v in judge_window(table)] == [(EACH * stage, EACH * stage + 1)])
    assert np.mean(right) >= 0.95, right


def test_a_slow_rank_on_top_is_that_rank() -> None:
    right = []
    for seed in range(40):
        table, work = _run(seed, each=4)
        rank = 4 * int(work.share.argmax()) + 1
        _slow(table, slice(rank, rank + 1))
        right.append([v.ranks for v in judge_window(table) if v.ranks] == [(rank,)])
    assert np.mean(right) >= 0.95, right
