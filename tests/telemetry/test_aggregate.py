"""Means over a window and spreads over ranks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.telemetry.aggregate import FOLD, Floats, Window, aggregate
from trainsys.telemetry.events import Comm, Flops, Memory, Step
from trainsys.telemetry.metrics import SECTIONS, step_metrics
from trainsys.telemetry.vectors import PLACE, TIMED, VECTOR, to_vector


def step(i: int, forward: float, *, loss: float | None = None, tokens: int = 100, peak: int = 0) -> Step:
    return Step(
        step=i,
        start_s=0.0,
        step_time_s=forward + 1.0,
        phases={"forward": forward, "comm/tp": 0.75, "other": 0.25},
        comm={"tp": {"all_reduce": Comm(2, 1000, 0.75)}},
        tokens=tokens,
        attn_pairs=7,
        loss=loss,
        memory=Memory(peak=peak, rss=3),
    )


def rows(*steps: Step) -> Floats:
    return np.array([to_vector(s) for s in steps])


def named(vector: Floats) -> dict[str, float]:
    return dict(zip(VECTOR, vector.tolist(), strict=True))


def test_window_is_a_mean_of_what_is_there() -> None:
    window = Window()
    window.add(step(4, 1.0, loss=6.0, peak=50))
    window.add(step(5, 3.0, peak=40))
    mean = named(window.take())
    assert mean["step"] == 5
    assert mean["step_time_s"] == 3.0
    assert mean["forward"] == 2.0
    assert mean["loss"] == 6.0
    assert math.isnan(mean["grad_norm"])
    assert (mean["peak"], mean["rss"]) == (50, 3)
    window.add(step(6, 5.0))
    again = named(window.take())
    assert (again["step"], again["forward"], again["peak"]) == (6, 5.0, 0)
    assert math.isnan(again["loss"])
    assert window.count == 0


def test_a_long_window_keeps_few_steps() -> None:
    window = Window()
    for i in range(10 * FOLD):
        window.add(step(i, float(i), peak=10 * FOLD - i))
        assert len(window._rows) <= FOLD
    mean = named(window.take())
    assert (mean["step"], mean["forward"], mean["peak"]) == (10 * FOLD - 1, (10 * FOLD - 1) / 2, 10 * FOLD)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_window_of_equal_sums_still_adds_up(times: list[float]) -> None:
    window = Window()
    for i, t in enumerate(times):
        window.add(step(i, t))
    mean = named(window.take())
    assert math.isclose(sum(mean[name] for name in TIMED), mean["step_time_s"], rel_tol=1e-9)


def test_aggregate_names_the_slowest_rank() -> None:
    ranks = [step(3, 1.0), step(3, 4.0, peak=9), step(3, 0.5), step(3, 2.5)]
    del ranks[2].phases["comm/tp"]
    seen = aggregate(rows(*ranks), replicas=2)
    assert (seen.step, seen.ranks, seen.tokens) == (3, 4, 200.0)
    forward = seen.phases["forward"]
    assert (forward.mean, forward.min, forward.max, forward.min_rank, forward.max_rank) == (
        2.0,
        0.5,
        4.0,
        2,
        1,
    )
    assert seen.phases["comm/tp"].min == 0.0
    assert seen.comm_bytes == {"tp": 4000.0}
    assert (seen.memory_peak.max, seen.memory_peak.max_rank) == (9.0, 1)
    with pytest.raises(ValueError, match=f"has {len(PLACE)} values, not 3"):
        aggregate(np.zeros((2, 3)))


def test_metrics_of_one_rank() -> None:
    one = step(3, 1.0, loss=2.5, peak=1 << 30)
    one.stalls, one.flops, one.mfu = {"eval": 5.0}, Flops(model=8.0), 0.4
    m = step_metrics(one, tokens=400, tokens_seen=999)
    assert m["train/loss"] == 2.5
    assert m["train/tokens"] == 999
    assert m["perf/tokens_per_s"] == 200.0
    assert m["perf/flops_per_s"] == 4.0
    assert m["perf/mfu"] == 0.4
    assert m["time/forward_s"] == 1.0
    assert m["comm/tp_s"] == 0.75
    assert m["comm/tp_gb"] == 1e-6
    assert m["time/stalls_s"] == 5.0
    assert m["memory/peak_gib"] == 1.0
    assert "train/lr" not in m
    assert {name.partition("/")[0] for name in m} == set(SECTIONS)


def test_metrics_of_all_ranks() -> None:
    one = step(3, 1.0, loss=2.5)
    one.mfu = 0.4
    other = step(3, 5.0, peak=2 << 30)
    other.stalls = {"eval": 5.0}
    m = step_metrics(one, aggregate(rows(one, other)))
    assert m["perf/step_time_s"] == 4.0
    assert m["perf/tokens_per_s"] == 50.0
    assert m["perf/mfu"] == pytest.approx(0.4 * 2.0 / 4.0)  # of the time shown, not of rank 0's own
    assert (m["time/forward_s"], m["time/max_forward_s"]) == (3.0, 5.0)
    assert m["memory/peak_gib"] == 2.0
    assert m["comm/tp_gb"] == 2e-6
    # Where ranks differ, the one that has most; both have the same communication and the same resident memory.
    assert {name: value for name, value in m.items() if name.endswith("_rank")} == {
        "time/max_forward_rank": 1.0,
        "time/stalls_rank": 1.0,
        "memory/peak_rank": 1.0,
    }
    swapped = step_metrics(one, aggregate(rows(other, one)))
    assert swapped["time/max_forward_rank"] == swapped["memory/peak_rank"] == 0.0
    alone = step_metrics(one, aggregate(rows(one)))
    assert not [name for name in alone if name.endswith("_rank")]
