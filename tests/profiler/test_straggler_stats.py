"""Straggler statistics: found when slow, silent when healthy, at any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.profiler.straggler import find_stragglers, group, peer_log_ratio


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_peer_ratio_is_to_the_median_of_the_others(r, t, seed):
    work = np.random.default_rng(seed).integers(1, 5, (t, r)).astype(float)
    got = peer_log_ratio(work)
    for i in range(r):
        others = np.delete(np.log(work), i, axis=1)
        np.testing.assert_allclose(got[:, i], np.log(work[:, i]) - np.median(others, axis=1), atol=1e-12)


def healthy(rng, t, r, noise=0.02):
    return rng.lognormal(0.0, noise, (t, r)) * rng.lognormal(0, 0.1, (t, 1))


@pytest.mark.parametrize("ranks", [2, 4, 8, 64, 1024])
def test_healthy_ranks_raise_no_alarm(ranks):
    alarms = sum(bool(find_stragglers(healthy(np.random.default_rng(s), 30, ranks))) for s in range(100))
    assert alarms <= 1


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_slow_rank_is_named_and_no_other(ranks):
    for seed in range(20):
        work = healthy(np.random.default_rng(seed), 30, ranks)
        work[:, ranks - 1] *= 1.08
        found = find_stragglers(work)
        assert [s.index for s in found] == [ranks - 1]
        assert found[0].slowdown == pytest.approx(0.08, abs=0.03)
        assert found[0].cost_s >= 0


def test_five_percent_among_ten_thousand():
    rng = np.random.default_rng(0)
    hits = false = 0
    for _ in range(10):
        work = healthy(rng, 50, 10_000)
        work[:, 1234] *= 1.05
        names = {s.index for s in find_stragglers(work)}
        hits += 1234 in names
        false += len(names - {1234})
    assert hits >= 9
    assert false == 0


def test_one_bad_step_is_no_straggler():
    work = healthy(np.random.default_rng(1), 30, 16)
    work[7, 3] *= 10
    assert find_stragglers(work) == []


def test_small_effects_are_left_alone_however_certain():
    work = np.ones((50, 16)) * np.linspace(0.999, 1.001, 50)[:, None]
    work[:, 5] *= 1.02
    assert find_stragglers(work) == []
    work[:, 5] *= 1.03
    assert [s.index for s in find_stragglers(work)] == [5]


def test_since_says_when_it_began():
    work = healthy(np.random.default_rng(2), 40, 12)
    work[12:, 4] *= 1.3
    assert abs(find_stragglers(work)[0].since - 12) <= 2


def test_peers_are_compared_within_their_stage():
    rng = np.random.default_rng(3)
    stage = np.repeat([0, 1], 8)
    work = healthy(rng, 30, 16) * np.where(stage == 1, 1.5, 1.0)
    assert find_stragglers(work, stage) == []
    work[:, 10] *= 1.2
    assert [s.index for s in find_stragglers(work, stage)] == [10]


def test_missing_entries_do_not_accuse():
    work = healthy(np.random.default_rng(4), 30, 12)
    work[:5, 2] = np.nan
    work[:, 7] = np.nan
    assert find_stragglers(work) == []


def test_one_step_of_few_ranks_says_nothing():
    assert find_stragglers([[1.0, 1.0, 2.0]]) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_large_group_is_judged_as_its_parts_would_be(seed):
    """Among many ranks only those that can be late are examined; the answer is the same as when all are."""
    rng = np.random.default_rng(seed)
    work = healthy(rng, 31 + seed % 2, 3 * group.SAMPLE)
    slow = rng.choice(work.shape[1], 6, replace=False)
    work[:, slow] *= rng.uniform(1.02, 1.3, 6)
    fast = find_stragglers(work)
    sample, group.SAMPLE = group.SAMPLE, 10**9
    try:
        whole = find_stragglers(work)
    finally:
        group.SAMPLE = sample
    assert [s.index for s in fast] == [s.index for s in whole]
    for a, b in zip(fast, whole, strict=True):
        assert (a.since, a.share) == (b.since, b.share)
        assert a.slowdown == pytest.approx(b.slowdown, abs=1e-3)
        assert a.cost_s == pytest.approx(b.cost_s)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fault_is_found_from_where_it_began_although_noise_leads_up_to_it(ranks):
    """A rank a little above its peers by chance, then 1.6 times as slow: one stretch over both would be called noise."""
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        work = rng.lognormal(0.0, 0.2, (195, ranks))
        work[:90, 0] *= 1.06
        work[90:190, 0] *= 1.6
        named = [s for s in find_stragglers(work, alpha=0.0025) if s.index == 0]
        found += bool(named) and abs(named[0].since - 90) <= 10 and abs(named[0].until - 190) <= 10
    assert found >= 14


def test_the_closer_look_accuses_no_healthy_rank():
    rng = np.random.default_rng(0)
    assert not any(find_stragglers(rng.lognormal(0.0, 0.2, (195, 2)), alpha=0.0025) for _ in range(200))


@pytest.mark.parametrize("slow", [slice(80, 240), slice(0, 160), slice(60, 180)])
def test_a_much_slower_stretch_is_found_among_steps_that_are_a_little_late_by_chance(slow):
    right = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 0.08, (240, 2))
        for t in range(1, 240):  # bursts: each step's noise is like the one before
            noise[t] = 0.6 * noise[t - 1] + 0.8 * noise[t]
        work = np.exp(noise)
        work[:, 1] *= 1.04
        work[slow, 1] *= 1.5
        found = find_stragglers(work, alpha=0.001)
        assert [s.index for s in found] in ([1], [])
        right += [abs(s.since - slow.start) <= 10 and abs(s.until - slow.stop) <= 10 for s in found]
    assert sum(right) >= 18, right
