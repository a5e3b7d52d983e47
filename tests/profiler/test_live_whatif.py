"""The what-if replay: arithmetic on a timeline made by hand, then ByteDance's recording against what they published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainsys.profiler.whatif import Op, Timeline, read_rows


def pipeline(slow: float = 1.0, late: float = 0.0) -> list[Op]:
    """Two stages, one data rank, two micro-batches, forward only: 1 s each, sends of 0.1 s; ``slow`` is stage 0's."""
    ops = []
    for m in range(2):
        done = slow * (m + 1)
        ops.append(Op(0, (0, 0), "forward-compute", done - slow, slow, m))
        ops.append(Op(0, (0, 0), "forward-send", done, 0.1 + late, m))
        # The receiver waits from early on: that is no time of the transfer.
        ops.append(Op(0, (0, 1), "forward-recv", 0.1 * m, done + 0.1 + late - 0.1 * m, m))
        ops.append(Op(0, (0, 1), "forward-compute", max(done, 2.0 * m) + 0.1 + late, 1.0, m))
    return ops


def test_the_replay_gives_what_happened_and_waiting_is_no_ones_time() -> None:
    even = Timeline(pipeline())
    assert even.actual_s == pytest.approx(3.1)
    assert even.slowdown == pytest.approx(1.0)
    slow = Timeline(pipeline(slow=2.0))
    assert slow.actual_s == pytest.approx(2 * 2 + 0.1 + 1)
    assert slow.ideal_s == pytest.approx(3 * 1.5 + 0.1)  # the mean of 1, 1, 2 and 2
    assert slow.by_stage()[0] > slow.by_stage()[1]
    assert slow.worst_workers() == [(0, 0)]
    assert slow.by_kind()["forward-compute"] == pytest.approx(slow.slowdown)
    assert slow.by_kind()["forward-pp-comm"] == pytest.approx(1.0)


SHARED = Path(__file__).resolve().parents[2] / "../shared/data/traces/bytedance_straggler"


def recording(steps: int | None) -> tuple[Timeline, dict[str, Any], list[str]]:
    if not SHARED.is_dir():
        pytest.skip("../shared/data/traces/bytedance_straggler is not here")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the recording is a parquet file")
    told = json.loads((SHARED / "result-AR.json").read_text())
    chosen = sorted(map(int, told["step_t_nodelay"]))[:steps]
    table = parquet.read_table(SHARED / "trace-AR.parquet", filters=[("step", "in", chosen)])
    return Timeline(read_rows(table.to_pylist())), told, [str(s) for s in chosen]


def check(timeline: Timeline, told: dict[str, Any], steps: list[str], rough: float) -> None:
    def mean(name: str, key: str) -> float:
        return float(np.mean([told[name][s][key] for s in steps]))

    assert timeline.actual_s == pytest.approx(np.mean([told["step_t_nodelay"][s] for s in steps]), rel=1e-3)
    ideal = next(iter(told["step_t_noblk"].values()))
    assert timeline.ideal_s == pytest.approx(ideal, rel=rough)
    by_kind = timeline.by_kind()
    for kind in ("backward-compute", "forward-compute", "grads-reduce-scatter"):
        assert by_kind[kind] == pytest.approx(mean("blocking_decompose_by_optype_per_step", kind), rel=rough)
    for stage, slow in timeline.by_stage().items():
        assert slow == pytest.approx(mean("blocking_decompose_by_stage_per_step", str(stage)), rel=rough)


def test_bytedance_on_some_steps() -> None:
    timeline, told, steps = recording(2)
    check(timeline, told, steps, rough=0.02)  # the ideal of two steps is not quite that of all
    assert timeline.worst_workers() == [(0, 0)]


@pytest.mark.slow
def test_bytedance_whole_equals_the_published_result() -> None:
    timeline, told, steps = recording(None)
    check(timeline, told, steps, rough=1e-3)
    assert timeline.slowdown == pytest.approx(told["blocking_slowdown"], rel=1e-3)
    worst = timeline.worst_workers()
    assert worst == [(0, 0)]
    m_w, m_s = (json.loads((SHARED / f"{n}-AR.json").read_text()) for n in ("mw", "ms"))
    # A group's operation belongs to all of its members; how much of it goes with one worker is a choice.
    assert timeline.gives_back(lambda w: w in worst) == pytest.approx(m_w["Mw"], abs=0.01)
    assert timeline.gives_back(lambda w: w[1] == 3) == pytest.approx(m_s["Ms"], abs=1e-3)
    for rank, slow in timeline.by_data_rank().items():
        assert slow == pytest.approx(told["blocking_decompose_by_dp_rank"][str(rank)], abs=0.006)
