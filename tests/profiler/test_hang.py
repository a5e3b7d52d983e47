"""Flight-recorder dumps: the injected ranks and no others; every kind of hang; damage is counted."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.profiler.hang import analyse_dumps
from trainsys.profiler.hang.dumps import parse_dump
from trainsys.profiler.trace.main import analyse, run


@pytest.mark.parametrize(
    ("folder", "kind"), [("gpu_error_1st", "device_stalled"), ("lock_gil_1st", "never_arrived")]
)
def test_injected_ranks_and_no_others(shared, folder, kind):
    where = shared / "flight_recorder" / folder
    injected = [int(r) for r in re.findall(r"Rank (\d+),", (where / "fault_injection.log").read_text())]
    report = analyse_dumps(sorted(where.glob("_dump_*")))
    assert [r.rank for r in report.roots] == sorted(injected)
    assert {r.kind for r in report.roots} == {kind}
    assert len(report.waiting) == 14
    assert not report.mismatches
    assert not report.missing


def test_a_slow_but_running_job_is_no_hang(shared):
    report = analyse_dumps(sorted((shared / "flight_recorder/gloo_3ranks_rank2_slow").glob("_dump*")))
    assert report.roots == []
    assert "no hang" in report.verdict


def entry(i, group, seq, op="all_reduce", *, done=False, sizes=((4,),), pg=0, p2p=False, frames=None):
    return {
        "record_id": i,
        "pg_id": pg,
        "process_group": (group, f"desc {group}"),
        "collective_seq_id": 0 if p2p else seq,
        "p2p_seq_id": seq if p2p else 0,
        "profiling_name": f"nccl:{op}",
        "input_sizes": [list(s) for s in sizes],
        "input_dtypes": ["Float"],
        "state": "completed" if done else "scheduled",
        "retired": done,
        "is_p2p": p2p,
        "frames": frames or [],
    }


def dump(entries, groups, status=None):
    done = {}
    for e in entries:
        n = str(e["pg_id"])
        enq, comp = done.get(n, (0, 0))
        s = e["collective_seq_id"]
        done[n] = (max(enq, s), max(comp, s) if e["state"] == "completed" else comp)
    return {
        "version": "2.9",
        "pg_config": {g: {"name": g, "desc": f"desc {g}", "ranks": str(r)} for g, r in groups.items()},
        "pg_status": {
            n: {"last_enqueued_collective": e, "last_started_collective": -1, "last_completed_collective": c}
            for n, (e, c) in (status or done).items()
        },
        "entries": entries,
    }


def judge(tmp_path, dumps, as_json=False):
    for rank, content in dumps.items():
        path = tmp_path / f"nccl_trace_rank_{rank}"
        path.write_bytes(json.dumps(content).encode() if as_json else pickle.dumps(content, protocol=2))
    return analyse_dumps(sorted(tmp_path.iterdir()))


WORLD = {"0": [0, 1, 2, 3]}


@pytest.mark.parametrize("as_json", [False, True])
def test_never_arrived_with_its_last_line(tmp_path, as_json):
    frame = [
        {"name": "wrapper", "filename": "x/site-packages/torch/d.py", "line": 1},
        {"name": "step", "filename": "train.py", "line": 42},
    ]
    dumps = {
        r: dump([entry(1, "0", 1, done=True, frames=frame)] + ([entry(2, "0", 2)] if r != 2 else []), WORLD)
        for r in range(4)
    }
    report = judge(tmp_path, dumps, as_json)
    assert [(r.rank, r.kind, r.where) for r in report.roots] == [(2, "never_arrived", "train.py:42 in step")]
    assert [w.rank for w in report.waiting] == [0, 1, 3]
    assert all(w.on == [2] for w in report.waiting)


def test_device_stalled_runs_ahead(tmp_path):
    dumps = {r: dump([entry(i, "0", i, done=i <= 6) for i in range(1, 8)], WORLD) for r in range(4)}
    dumps[1] = dump([entry(i, "0", i, done=i <= 3) for i in range(1, 8)], WORLD)
    report = judge(tmp_path, dumps)
    assert [(r.rank, r.kind, r.outstanding) for r in report.roots] == [(1, "device_stalled", 4)]


def test_missing_dump(tmp_path):
    dumps = {r: dump([entry(1, "0", 1)], WORLD) for r in range(3)}
    report = judge(tmp_path, dumps)
    assert report.missing == [3]
    assert [(r.rank, r.kind) for r in report.roots] == [(3, "no_dump")]


def test_blame_travels_along_the_chain(tmp_path):
    """0 waits in tp for 1, 1 in a receive for 3, 3 in its own tp for 2, and 2 is nowhere."""
    groups = {"0": [0, 1], "1": [2, 3], "2": [1, 3]}
    dumps = {
        0: dump([entry(1, "0", 5, pg=1)], groups),
        1: dump([entry(1, "2", 9, "recv 0<-1", p2p=True, pg=2)], groups, {"1": (4, 4)}),
        2: dump([entry(1, "1", 7, done=True, pg=1)], groups),
        3: dump([entry(1, "1", 8, pg=1)], groups),
    }
    report = judge(tmp_path, dumps)
    assert [r.rank for r in report.roots] == [2]
    assert {w.rank: w.on for w in report.waiting} == {0: [1], 1: [3], 3: [2]}


def test_mismatched_collective(tmp_path):
    dumps = {r: dump([entry(1, "0", 1, "all_gather" if r == 1 else "all_reduce")], WORLD) for r in range(4)}
    report = judge(tmp_path, dumps)
    assert report.mismatches[0].variants.keys() == {
        "all_gather [4] Float",
        "all_reduce [4] Float",
    }
    assert "operation mismatch at collective #1" in report.verdict


def test_mismatched_sizes(tmp_path):
    dumps = {r: dump([entry(1, "0", 1, sizes=((4 + (r == 3),),))], WORLD) for r in range(4)}
    assert judge(tmp_path, dumps).mismatches[0].variants.popitem()[1] == [3]


def test_ring_of_waiters(tmp_path):
    groups = {"a": [0, 1], "b": [0, 1]}
    dumps = {
        0: dump([entry(1, "a", 1, pg=1), entry(2, "b", 1, pg=2)], groups),
        1: dump([entry(1, "b", 1, pg=2), entry(2, "a", 1, pg=1)], groups),
    }
    report = judge(tmp_path, dumps)
    assert report.roots == []
    assert sorted(report.cycles[0]) == [0, 1]
    assert "ring" in report.verdict


def test_all_in_one_collective_is_the_networks(tmp_path):
    report = judge(tmp_path, {r: dump([entry(1, "0", 1)], WORLD) for r in range(4)})
    assert report.roots == []
    assert len(report.together) == 1
    assert "network" in report.verdict


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 7), min_size=1, max_size=3), st.booleans(), st.integers(0, 2**31))
def test_random_jobs_name_the_stopped_ranks_and_no_others(tmp_path_factory, stopped, stalled, seed):
    """A random schedule over tp and dp groups; some ranks stop at random points; the rest run until they must wait."""
    import random

    rng = random.Random(seed)
    groups = {f"tp{i}": [2 * i, 2 * i + 1] for i in range(4)} | {
        f"dp{j}": list(range(j, 8, 2)) for j in range(2)
    }
    schedule = [rng.choice(["tp", "dp"]) for _ in range(12)] + ["tp", "dp"] * 3
    stop = {r: rng.randrange(2, 12) for r in stopped}

    def group(rank, kind):
        return f"tp{rank // 2}" if kind == "tp" else f"dp{rank % 2}"

    enqueued = {r: (stop[r] if r in stop and not stalled else len(schedule)) for r in range(8)}
    finished = dict.fromkeys(range(8), 0)
    moved = True
    while (
        moved
    ):  # an operation finishes on a rank once all members reach it; a stalled device reaches no further
        moved = False
        for r in range(8):
            i = finished[r]
            if i >= enqueued[r] or (stalled and r in stop and i >= stop[r]):
                continue
            members = groups[group(r, schedule[i])]
            # A stalled device still takes part in what it stalls in: its peers get past it, it does not.
            if all(finished[m] >= i and enqueued[m] > i for m in members):
                finished[r], moved = i + 1, True
    reached = {r for r in stop if finished[r] >= stop[r]}
    dumps = {}
    for r in range(8):
        seq: dict[str, int] = {}
        entries = []
        for i in range(enqueued[r]):
            name = group(r, schedule[i])
            seq[name] = seq.get(name, 0) + 1
            entries.append(entry(i, name, seq[name], done=i < finished[r], pg=int(name.startswith("dp"))))
        dumps[r] = dump(entries, groups)
    report = judge(tmp_path_factory.mktemp("fr"), dumps)
    found = {r.rank for r in report.roots}
    assert found <= set(stop)
    first = min(stop.values())
    assert {r for r in reached if stop[r] == first} <= found


def test_bad_dumps(tmp_path):
    good = dump([entry(1, "0", 1)], WORLD)
    good["entries"] += [{"record_id": "x"}, 5]
    for name, data in (
        ("dump_0", pickle.dumps(good)),
        ("dump_1", pickle.dumps(good)[:40]),
        ("dump_2", b"{]"),
    ):
        (tmp_path / name).write_bytes(data)
    report = analyse_dumps(sorted(tmp_path.iterdir()))
    assert report.ranks == [0]
    assert report.said["dropped: flight-recorder entry with missing or wrong fields"] == 2
    assert sum("unreadable" in k for k in report.said) == 2
    with pytest.raises(UserError, match="dump_1"):
        analyse_dumps([tmp_path / "dump_1"])
    (tmp_path / "nodigits").write_bytes(pickle.dumps(good))
    with pytest.raises(UserError, match="which rank"):
        analyse_dumps([tmp_path / "nodigits"])


def test_by_the_command(tmp_path, shared):
    text = run([shared / "flight_recorder/lock_gil_1st"])
    assert text.startswith("What is wrong\n  1. rank 9 never arrived (host stopped), rank 14 never arrived")


@pytest.mark.parametrize(
    ("odd", "what", "advice"),
    [
        ({"input_sizes": [[5]]}, "size", "uneven"),
        ({"input_dtypes": ["BFloat16"]}, "dtype", "autocast"),
        ({"profiling_name": "nccl:all_gather"}, "operation", "same collectives"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 3])
def test_a_mismatch_is_explained_with_its_line_and_its_own_advice(tmp_path, odd, what, advice, culprit):
    line = [{"filename": "/me/train.py", "line": 42, "name": "step"}]
    dumps = {
        r: dump([entry(1, "0", 1, frames=line) | (odd if r == culprit else {})], WORLD) for r in range(4)
    }
    report = judge(tmp_path, dumps)
    assert report.verdict.startswith(
        f"{what} mismatch at collective #1 of group 0 (desc 0): rank {culprit}: "
    )
    assert report.verdict.count("at /me/train.py:42 in step") == 2
    (verdict,) = analyse([tmp_path]).verdicts
    assert advice in verdict.advice
    assert "others only wait" not in verdict.advice


def test_what_finished_everywhere_is_no_mismatch(tmp_path):
    dumps = {r: dump([entry(1, "0", 1, sizes=((4 + r,),), done=True)], WORLD) for r in range(4)}
    assert judge(tmp_path, dumps).mismatches == []


@pytest.mark.parametrize(
    ("name", "rank"), [("send 0->1", 0), ("recv 1<-0", 1), ("recv 0->1", 1), ("send 1->0", 1)]
)
def test_the_peer_is_the_other_rank(tmp_path, name, rank):
    groups = {"0": [4, 7]}
    path = tmp_path / "dump_0"
    content = dump([entry(1, "0", 1, name, p2p=True)], groups) | {"rank": groups["0"][rank]}
    (operation,) = parse_dump(path, content, Counter()).operations
    assert operation.peer == groups["0"][1 - rank]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("f01_hostnames", "rank 2 never arrived"),
        ("f02_missing_dump", "rank 1 left no dump"),
        ("f03_completed_unretired", "no hang in a collective"),
        ("f04_size_mismatch", "rank 3: all_reduce [1025]"),
        ("f06_a2a", "rank 0 never arrived"),
        ("f07_dtype", "rank 1: all_reduce [1024] Float"),
    ],
)
def test_cases(case, words):
    folder = Path(__file__).resolve().parents[2] / "../shared/data/cases/traces" / case
    if not folder.is_dir():
        pytest.skip("../shared/data/cases is not here")
    assert words in analyse_dumps(sorted(folder.iterdir())).verdict
