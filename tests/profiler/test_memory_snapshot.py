"""Allocator snapshots: the peak and its holders against a replay, the recorded one, and refusals."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.profiler.memory_snapshot import analyse_snapshot


def frames(line, name="forward", file="/home/me/model.py"):
    return [
        {"name": "torch::unwind", "filename": "??", "line": 0},
        {"name": name, "filename": file, "line": line},
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 3)), max_size=40), st.integers(0, 3)
)
def test_peak_and_holders_are_those_of_a_replay(tmp_path_factory, moves, before):
    """Allocations and frees at random; some blocks are older than the recording."""
    live = {10_000 + i: (7, frames(99)) for i in range(before)}
    events, peak, best, address = [], sum(s for s, _ in live.values()), dict(live), 0
    for alloc, size, line in moves:
        if alloc or not live:
            address += 1
            live[address] = (size, frames(line))
            events.append(
                {
                    "action": "alloc",
                    "addr": address,
                    "size": size,
                    "time_us": len(events),
                    "frames": frames(line),
                }
            )
        else:
            victim = sorted(live)[size % len(live)]
            gone = live.pop(victim)[0]
            events.append(
                {
                    "action": "free_requested",
                    "addr": victim,
                    "size": gone,
                    "time_us": len(events),
                    "frames": [],
                }
            )
            events.append(
                {
                    "action": "free_completed",
                    "addr": victim,
                    "size": gone,
                    "time_us": len(events),
                    "frames": [],
                }
            )
        total = sum(s for s, _ in live.values())
        if total > peak:
            peak, best = total, dict(live)
    blocks = [
        {"address": a, "size": s, "requested_size": s, "state": "active_allocated", "frames": f}
        for a, (s, f) in live.items()
    ]
    blocks.append({"address": 50_000, "size": 5, "requested_size": 0, "state": "inactive", "frames": []})
    snapshot = {
        "segments": [
            {"device": 0, "address": 0, "total_size": sum(b["size"] for b in blocks), "blocks": blocks}
        ],
        "device_traces": [events],
    }
    path = tmp_path_factory.mktemp("s") / "s.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    (r,) = analyse_snapshot(path)
    assert r.peak == peak
    assert sum(r.by_part.values()) == peak
    assert "not attributed" not in r.by_part
    want: dict[int, int] = {}
    for a, (s, f) in best.items():
        if a < 10_000:
            want[f[1]["line"]] = want.get(f[1]["line"], 0) + s
    got = {
        int(h.where.split(":")[1].split(" ")[0]): h.bytes
        for h in r.holders
        if "model.py" in h.where and ":99" not in h.where
    }
    assert got == {k: v for k, v in want.items() if k != 99}
    assert r.active == sum(s for s, _ in live.values())
    assert r.largest_free_block == 5
    assert max(p[1] for p in r.timeline) == peak


def test_recorded_snapshot(shared):
    (r,) = analyse_snapshot(shared / "memory_snapshot/train_step.pickle")
    assert round(r.reserved / 2**30, 1) == 22.2
    assert round(r.active / 2**30, 1) == 14.9
    assert r.reserved == r.active + r.inactive
    assert sum(r.by_part.values()) == r.peak
    assert r.by_part["optimizer"] / 2**30 == pytest.approx(7.43, abs=0.01)
    assert r.holders[1].where.startswith("cs336_systems/adapters.py:88")
    assert abs(r.by_part.get("not attributed", 0)) < 0.01 * r.peak


def test_out_of_memory_that_would_have_fitted(tmp_path):
    gib = 1 << 30
    events = [
        {"action": "segment_alloc", "addr": 0, "size": 4 * gib, "time_us": 0, "frames": []},
        {"action": "alloc", "addr": gib, "size": gib, "time_us": 1, "frames": frames(1)},
        {"action": "alloc", "addr": 3 * gib, "size": gib // 2, "time_us": 1, "frames": frames(1)},
        {
            "action": "oom",
            "addr": 0,
            "size": 2 * gib,
            "device_free": gib // 4,
            "time_us": 2,
            "frames": frames(7),
        },
        {
            "action": "oom",
            "addr": 0,
            "size": 9 * gib,
            "device_free": gib // 4,
            "time_us": 3,
            "frames": frames(8),
        },
    ]
    blocks = [
        {"address": gib, "size": gib, "requested_size": gib, "state": "active_allocated", "frames": frames(1)}
    ]
    snapshot = {
        "segments": [{"device": 0, "address": 0, "total_size": 4 * gib, "blocks": blocks}],
        "device_traces": [events],
    }
    path = tmp_path / "oom.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    first, second = analyse_snapshot(path)[0].out_of_memory
    assert (first.largest_free_block, first.total_free, first.would_fit) == (gib, 5 * gib // 2, True)
    assert second.would_fit is False
    assert "model.py:7" in first.where


@pytest.mark.parametrize(
    "content",
    [
        {"segments": [], "x": 1},
        [1, 2],
        {"segments": [{"device": "zero"}], "device_traces": []},
        {
            "segments": [{"device": 0, "blocks": [{"state": "active_allocated"}], "total_size": 1}],
            "device_traces": [[]],
        },
        {"segments": [{"device": 0, "blocks": 5, "total_size": 1}], "device_traces": 7},
    ],
)
def test_what_is_not_a_snapshot_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"bad\.pickle") as caught:
        analyse_snapshot(path)
    assert "\n" not in str(caught.value)
