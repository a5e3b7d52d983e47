"""Allocator snapshots: the peak and its holders against a replay, the recorded one, and refusals."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.profiler.memory_snapshot import analyse_snapshot
from trainsys.profiler.trace.main import analyse


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


def report_of(tmp_path, snapshot):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    (report,) = analyse_snapshot(path)
    return report


@pytest.mark.parametrize("mapped", [True, False])
def test_out_of_memory_that_would_have_fitted(tmp_path, mapped):
    """``mapped``: whether the history reaches back to where the segment was mapped."""
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
        {
            "address": at,
            "size": size,
            "requested_size": size,
            "state": "active_allocated",
            "frames": frames(1),
        }
        for at, size in ((gib, gib), (3 * gib, gib // 2))
    ]
    snapshot = {
        "segments": [{"device": 0, "address": 0, "total_size": 4 * gib, "blocks": blocks}],
        "device_traces": [events if mapped else events[1:]],
    }
    first, second = report_of(tmp_path, snapshot).out_of_memory
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


def block(address, size, state="active_allocated", **more):
    return {
        "address": address,
        "size": size,
        "requested_size": size,
        "state": state,
        "frames": frames(1),
        **more,
    }


@pytest.mark.parametrize(
    ("segment", "usable", "fits", "title"),
    [
        ({}, 800, True, "failed that would have fitted"),
        ({"segment_pool_id": (0, 7)}, 0, False, "other pools would have held"),
        ({"stream": 3}, 0, False, "other pools would have held"),
        ({"is_expandable": True}, 800, True, "failed that would have fitted"),
    ],
)
def test_what_a_refused_request_could_have_used(tmp_path, segment, usable, fits, title):
    mib = 1 << 20
    oom = {
        "action": "oom",
        "addr": 0,
        "size": 600 * mib,
        "device_free": 0,
        "stream": 0,
        "time_us": 1,
        "frames": frames(7),
    }
    segments = [
        {
            "device": 0,
            "address": i * 4096 * mib,
            "total_size": 600 * mib,
            "blocks": [block(i * 4096 * mib, 200 * mib)],
            **segment,
        }
        for i in range(2)
    ]
    report = report_of(tmp_path, {"segments": segments, "device_traces": [[oom]]})
    (refused,) = report.out_of_memory
    assert (refused.total_free, refused.would_fit) == (usable * mib, fits)
    assert refused.total_free + refused.elsewhere_free == 800 * mib
    assert report.private == (1200 * mib if "segment_pool_id" in segment else 0)
    (verdict,) = [v for v in analyse([tmp_path]).verdicts if "failed" in v.title]
    assert title in verdict.title
    assert ("expandable_segments:True" in verdict.advice) == (fits and "is_expandable" not in segment)


def test_parts_of_an_expandable_segment_are_one_stretch_at_the_time_of_the_refusal(tmp_path):
    events = [
        {"action": "oom", "addr": 0, "size": 500, "device_free": 0, "time_us": 1, "frames": []},
        {"action": "segment_map", "addr": 300, "size": 300, "time_us": 2, "frames": []},
    ]
    segment = {"device": 0, "address": 0, "total_size": 600, "is_expandable": True, "blocks": [block(0, 100)]}
    (refused,) = report_of(tmp_path, {"segments": [segment], "device_traces": [events]}).out_of_memory
    assert (refused.largest_free_block, refused.expandable) == (200, True)


def history(rounds, leak):
    """Rounds that allocate and free an activation; with ``leak`` one line keeps a block of each."""
    events, live = [], []
    for i in range(rounds):
        a, b = 10_000 + i, 20_000 + i
        events += [
            {"action": "alloc", "addr": a, "size": 1000, "time_us": i, "frames": frames(5)},
            {"action": "alloc", "addr": b, "size": 50, "time_us": i, "frames": frames(6)},
            {"action": "free_completed", "addr": a, "size": 1000, "time_us": i, "frames": []},
        ]
        if leak:
            live.append(block(b, 50))
        else:
            events.append({"action": "free_completed", "addr": b, "size": 50, "time_us": i, "frames": []})
    segment = {"device": 0, "address": 0, "total_size": 10**6, "blocks": live}
    return {"segments": [segment], "device_traces": [events]}


def test_a_line_that_keeps_what_it_allocates_is_a_leak(tmp_path):
    (leak,) = report_of(tmp_path, history(40, True)).leaks
    assert (leak.bytes, leak.blocks) == (40 * 50, 40)
    assert "model.py:6" in leak.where
    assert any("model.py:6" in v.title for v in analyse([tmp_path]).verdicts)
    assert report_of(tmp_path, history(40, False)).leaks == []


def test_a_model_being_built_is_no_leak(tmp_path):
    content = history(40, True)
    content["device_traces"] = [
        [e for e in content["device_traces"][0] if e["action"] == "alloc" and e["size"] == 50]
    ]
    assert report_of(tmp_path, content).leaks == []


def test_blocks_waiting_for_a_stream_are_said(tmp_path):
    blocks = [block(0, 500, "active_pending_free"), block(500, 500)]
    report = report_of(
        tmp_path,
        {
            "segments": [{"device": 0, "address": 0, "total_size": 1000, "blocks": blocks}],
            "device_traces": [[]],
        },
    )
    assert report.pending_free == 500


def test_compiled_rows_are_one_region_and_layers_keep_their_order(tmp_path):
    generated = "/tmp/torchinductor_me/ab/cab.py"
    stacks = [[*frames(line, "call", generated), *frames(55)] for line in (10, 20, 30)] + [frames(7)] * 3
    blocks = [block(i * 100, 10 * (i + 1), frames=f) for i, f in enumerate(stacks)]
    report = report_of(
        tmp_path,
        {
            "segments": [{"device": 0, "address": 0, "total_size": 1000, "blocks": blocks}],
            "device_traces": [[]],
        },
    )
    rows = {h.where: h for h in report.holders}
    assert rows["compiled region cab.py, called at me/model.py:55"].blocks == 3
    assert rows["me/model.py:7 in forward"].each == [40, 50, 60]


@pytest.mark.parametrize("name", ["m03_fragmented_oom", "m09_fragmented_with_history"])
def test_a_refusal_is_explained_with_or_without_the_segments_history(name):
    path = Path(__file__).resolve().parents[2] / f"../shared/data/cases/traces/{name}.pickle"
    if not path.exists():
        pytest.skip("../shared/data/cases is not here")
    (report,) = analyse_snapshot(path)
    (refused,) = report.out_of_memory
    assert (refused.would_fit, refused.total_free >> 30, refused.largest_free_block >> 20) == (True, 32, 512)
