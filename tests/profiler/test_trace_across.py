"""Matching, clocks, waiting, stragglers and bandwidth over ranks, against what was simulated and recorded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.profiler.trace.across import bus_factor, compare_ranks
from trainsys.profiler.trace.commlist import CommList, GroupKey
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.matching import match
from trainsys.profiler.trace.synthetic import Job, write_job


def test_synthetic_waits_clocks_and_straggler(slow_job):
    job, timeline, folder = slow_job
    report = analyse([folder])
    across = report.across
    members = job.members(0)
    assert across.matched == job.steps * job.layers
    assert [r.wait_ns for r in across.ranks] == timeline.waits(members).sum(axis=0).tolist()
    assert [r.last for r in across.ranks] == [0, 0, across.matched, 0]
    offsets = [r.clock_offset_ns for r in across.ranks]
    assert [o - offsets[0] for o in offsets] == [0, 0, 5_000_000, 5_000_000]
    assert across.end_spread_ns == 0
    assert [s.rank for s in across.stragglers] == [2]
    assert across.stragglers[0].slowdown == pytest.approx(0.1, abs=0.03)
    (row,) = across.bandwidth
    assert (row.op, row.members, row.size, row.axis) == ("all_reduce", 4, 2 << 20, "dp")
    assert row.bus_gb_s == pytest.approx((2 << 20) * 1.5 / job.reduce_ns, rel=1e-3)
    assert row.link_gb_s == 450
    assert any(v.kind == "straggler" and "rank 2 " in v.title for v in report.verdicts)


def test_healthy_job_blames_nobody(tmp_path):
    write_job(Job(ranks=6, steps=8, noise=0.01, clock_ns={0: 123_456}), tmp_path)
    report = analyse([tmp_path], critical=False)
    assert report.across.stragglers == []
    assert not [v for v in report.verdicts if v.kind in ("straggler", "late")]


def test_waiting_is_not_answered_by_overlap(tmp_path):
    """A wait for a rank that has not arrived is as long whatever else is done meanwhile."""
    said = {}
    for name, job in (("late", Job(ranks=4, steps=6, slow={2: 2.0})), ("even", Job(ranks=4, steps=6, noise=0.0))):
        write_job(job, tmp_path / name)
        report = analyse([tmp_path / name], critical=False)
        (said[name],) = [v for v in report.verdicts if v.kind == "communication"]
    assert "overlap gradient reduction" in said["even"].advice
    assert "even out when ranks arrive" in said["late"].advice
    assert "overlap gradient" not in said["late"].advice


def test_groups_are_told_apart(tmp_path):
    job = Job(ranks=8, group=2, steps=5, slow={5: 1.3}, noise=0.005)
    timeline = write_job(job, tmp_path)
    across = analyse([tmp_path], critical=False).across
    assert across.matched == 4 * job.steps * job.layers
    for first in (0, 2, 4, 6):
        got = [r.wait_ns for r in across.ranks if r.rank in (first, first + 1)]
        assert got == timeline.waits([first, first + 1]).sum(axis=0).tolist()
    assert [s.rank for s in across.stragglers] == [5]


def test_missing_rank_is_no_obstacle(tmp_path):
    job = Job(ranks=4, steps=4)
    write_job(job, tmp_path)
    (tmp_path / "rank00001.json").unlink()
    report = analyse([tmp_path], critical=False)
    assert [r.rank for r in report.ranks] == [0, 2, 3]
    assert report.across.matched == 16
    assert report.across.bandwidth[0].members == 4


def test_dlrm_eight_ranks(shared):
    across = analyse([shared / "dlrm8_v100_8ranks"]).across
    assert across.matched == 8
    assert across.end_spread_ns <= 7_000
    by_rank = {r.rank: r for r in across.ranks}
    assert by_rank[7].last == 5
    assert round(by_rank[7].comm_ns / 1000) == 1746
    others = [round(by_rank[r].comm_ns / 1000) for r in range(7)]
    assert (min(others), max(others)) == (3492, 11336)
    assert min(across.ranks, key=lambda r: r.wait_ns).rank == 7
    assert max(across.ranks, key=lambda r: r.caused_ns).rank == 7


def commlist(starts, ends, ops=None, sizes=None, seq=None):
    n = len(starts)
    ops = ops or ["all_reduce"] * n
    names = sorted(set(ops))
    key = GroupKey("0", "0:dp", "dp", ())
    return CommList(
        np.array(starts),
        np.array(ends),
        np.zeros(n, np.int64),
        np.array([names.index(o) for o in ops]),
        np.array(sizes or [64] * n),
        np.array(seq or [-1] * n),
        np.full(n, -1),
        [key],
        names,
        False,
    )


def test_sequence_numbers_match_where_order_would_not():
    a = commlist([0, 10, 20], [5, 15, 25], seq=[4, 5, 6])
    b = commlist([12, 22, 32], [15, 25, 35], seq=[5, 6, 7])
    found = match({0: a, 1: b})
    (m,) = found.groups
    assert m.start.tolist() == [[10, 12], [20, 22]]
    assert found.said == {"communications without a partner on the other ranks": 2}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(10, 16), st.integers(-(10**9), 10**9))
def test_recordings_that_began_at_different_times_are_shifted_into_place(skip_a, skip_b, n, offset):
    rng = np.random.default_rng(n)
    end = np.cumsum(rng.integers(100, 900, n)) * 1000
    sizes = rng.integers(1, 4, n).tolist()
    a = commlist((end - 50_000)[skip_a:], end[skip_a:], sizes=sizes[skip_a:])
    b = commlist((end - 20_000)[skip_b:] + offset, end[skip_b:] + offset, sizes=sizes[skip_b:])
    (m,) = match({0: a, 1: b}).groups
    first = max(skip_a, skip_b)
    assert m.end[:, 0].tolist() == end[first:].tolist()
    assert (m.end[:, 1] - m.end[:, 0] == offset).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(10**7), 10**7), min_size=3, max_size=3))
def test_clocks_of_hosts_are_recovered_through_overlapping_groups(offsets):
    """Host 0 and 2 share no collective: 1 joins them."""
    end = np.arange(1, 9) * 10_000
    left, right = GroupKey("a", "a", "dp", (0, 1)), GroupKey("b", "b", "dp", (1, 2))
    comms = {}
    for r, keys in ((0, [left]), (1, [left, right]), (2, [right])):
        parts = [
            commlist(end - 500 + offsets[r] + i * 5000, end + offsets[r] + i * 5000) for i in range(len(keys))
        ]
        joined = parts[0]
        if len(parts) == 2:
            joined.start = np.concatenate([p.start for p in parts])
            joined.end = np.concatenate([p.end for p in parts])
            joined.key = np.repeat([0, 1], len(end))
            joined.op, joined.size, joined.seq, joined.step = (
                np.concatenate([getattr(p, k) for p in parts]) for k in ("op", "size", "seq", "step")
            )
        joined.keys = keys
        comms[r] = joined
    comms[2].start, comms[2].end = comms[2].start + 5000, comms[2].end + 5000
    across = compare_ranks([match(comms)], {})
    got = [r.clock_offset_ns for r in across.ranks]
    assert [g - got[0] for g in got] == pytest.approx([o - offsets[0] for o in offsets], abs=2)
    assert across.end_spread_ns <= 2


def test_one_host_has_one_clock():
    a, b = commlist([0, 100], [50, 150]), commlist([10, 110], [90, 190])

    def _across(hosts):
        return compare_ranks([match({0: a, 1: b}, hosts)], hosts)

    assert {r.clock_offset_ns for r in _across({0: "h", 1: "h"}).ranks} == {0}
    assert {r.clock_offset_ns for r in _across({0: "h", 1: "i"}).ranks} == {-20, 20}


def test_bus_factors_are_nccl_tests():
    assert bus_factor("all_reduce", 8) == 2 * 7 / 8
    assert (
        bus_factor("all_gather", 8) == bus_factor("reduce_scatter", 8) == bus_factor("all_to_all", 8) == 7 / 8
    )
    assert bus_factor("broadcast", 8) == bus_factor("send_recv", 2) == 1
