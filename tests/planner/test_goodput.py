"""Young-Daly and expected progress against their definitions and a simulation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.planner.cluster import load_cluster
from trainsys.planner.goodput import checkpoint_seconds, goodput, young_daly


def test_young_daly_is_youngs_for_rare_failures() -> None:
    assert young_daly(10.0, 1e8) == pytest.approx((2 * 10 * 1e8) ** 0.5, rel=1e-3)


@settings(deadline=None)
@given(st.floats(1, 300), st.floats(3600, 1e7))
def test_no_other_interval_is_much_better(save: float, mtbf: float) -> None:
    best = goodput(1, mtbf, save, 60.0)
    for factor in (0.3, 0.7, 1.5, 3.0):
        assert goodput(1, mtbf, save, 60.0, best.interval_s * factor).share <= best.share * 1.002


def test_share_matches_a_simulated_run() -> None:
    rng = random.Random(0)
    mtbf, save, restart, interval = 20_000.0, 60.0, 300.0, 1500.0
    done = wall = 0.0
    fail = rng.expovariate(1 / mtbf)
    while done < 4e6:
        if fail >= interval + save:
            fail -= interval + save
            wall += interval + save
            done += interval
        else:
            wall += fail
            fail = rng.expovariate(1 / mtbf)
            while fail < restart:
                wall += fail
                fail = rng.expovariate(1 / mtbf)
            wall += restart
            fail -= restart
    assert goodput(1, mtbf, save, restart, interval).share == pytest.approx(done / wall, rel=0.02)


def test_more_nodes_fail_more_and_llama3_scale_is_lived_with() -> None:
    small, large = goodput(16, 6.1e7, 5, 600), goodput(2048, 6.1e7, 5, 600)
    assert small.share > large.share
    # Grattafiori et al. 2024: more than 90% effective training time on 16,384 GPUs.
    assert 0.9 < large.share < 1.0
    assert goodput(10**6, 3600.0, 60, 600).share < 0.01


def test_checkpoint_time_scales_with_nodes() -> None:
    assert checkpoint_seconds(70e9, 128, 2.0, 2000.0) == pytest.approx(0.1 * 12 * 70e9 / 256e9)
    # 2,048 nodes could write 4 TB/s; what they write to takes 2.
    assert checkpoint_seconds(405e9, 2048, 2.0, 2000.0) == pytest.approx(0.1 * 12 * 405e9 / 2e12)


def test_failures_of_a_cluster_are_llama_3s() -> None:
    """419 unexpected interruptions in 54 days on 2,048 nodes (arXiv:2407.21783, section 3.3.4): one in 3.1 hours."""
    mtbf_hours = load_cluster("dgx-h100").mtbf_hours_per_node / 2048
    assert mtbf_hours == pytest.approx(54 * 24 / 419, rel=1e-3)


def test_refuses_nonsense() -> None:
    with pytest.raises(UserError, match="nodes=0"):
        goodput(0, 1.0, 1.0, 1.0)
