"""Whose each file is (rank, capture, device), and that no verdict comes from collectives wrongly paired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from profiling.trace_pairing import run as pairing_study
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.pairing import Column, pair
from trainsys.profiler.trace.synthetic import Job, write_job
from trainsys.profiler.trace.text import render

CASES = Path(__file__).resolve().parents[2] / "../shared/data/cases/traces"
GEMM, REDUCE = "ampere_bf16_s16816gemm_bf16_128x128", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(x)"


@pytest.fixture(scope="session")
def cases() -> Path:
    if not CASES.is_dir():
        pytest.skip("../shared/data/cases/traces is not here")
    return CASES


def write(path: Path, kernels: list[tuple[str, int, int]], *, rank: int | None = 0, world: int = 2, device: int = 0,
          first: int = 0, host: str = "") -> Path:  # fmt: skip
    """A trace of kernels (name, start us, duration us); all-reduces numbered from ``first``."""
    events = []
    for name, ts, dur in kernels:
        args: dict[str, object] = {"device": device, "stream": 7}
        if "nccl" in name:
            args |= {"stream": 20, "Collective name": "allreduce", "In msg nelems": 4096, "dtype": "BFloat16",
                     "Group size": world, "Process Group Name": "0", "Process Group Description": "dp",
                     "Seq": first}  # fmt: skip
            first += 1
        events.append(
            {
                "ph": "X",
                "cat": "kernel",
                "name": name,
                "pid": device,
                "tid": 7,
                "ts": ts,
                "dur": dur,
                "args": args,
            }
        )
    head = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}],
        "host_name": host,
    }
    if rank is not None:
        head["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": world}
    path.write_text(json.dumps({**head, "traceEvents": events}))
    return path


def steps(begin: int, work: int, n: int = 4) -> list[tuple[str, int, int]]:
    """``n`` steps of 5 ms, each a product of ``work`` us and an all-reduce that ends 4.5 ms in."""
    out = []
    for s in range(begin, begin + n):
        out += [(GEMM, s * 5000, work), (REDUCE, s * 5000 + work, 4500 - work)]
    return out


@pytest.mark.parametrize("order", ["rank first", "window first"])
def test_captures_of_a_rank_are_its_windows_not_new_ranks(tmp_path, order):
    for window in range(2):
        for rank in range(2):
            name = f"rank{rank}_step{window}" if order == "rank first" else f"{window}_rank{rank}"
            kernels = steps(window * 1000, 3000 + 1000 * rank)
            write(tmp_path / f"{name}.json", kernels, rank=rank, first=4 * window)
    report = analyse([tmp_path])
    assert [(r.rank, r.window) for r in report.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert report.across.matched == 8
    assert [r.last for r in report.across.ranks] == [0, 8]
    assert "2 ranks, 2 captures" in render(report)
    assert report.verdicts[0].title.startswith("rank 1 ")


def test_files_without_a_rank_of_one_worker_are_one_rank(tmp_path):
    for worker in (1000, 1001):
        for stamp in (1700000000000, 1700000010000):
            kernels = steps(stamp % 10**8 // 100, 3000)
            write(tmp_path / f"node_{worker}.{stamp}.pt.trace.json", kernels, rank=None)
    assert [(r.rank, r.window) for r in analyse([tmp_path]).ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_rank_in_the_name_that_the_world_has_not_is_no_rank(tmp_path):
    write(tmp_path / "rank0.json", steps(0, 3000), rank=0, world=2)
    write(tmp_path / "rank7.json", steps(0, 3000), rank=None)
    report = analyse([tmp_path])
    assert [r.rank for r in report.ranks] == [0, 1]
    assert report.world == 2


def test_two_jobs_in_one_folder_are_not_one_job(tmp_path):
    write(tmp_path / "a.json", steps(0, 3000))
    write(tmp_path / "b.json", steps(0, 2000, n=3))
    report = analyse([tmp_path])
    assert [r.rank for r in report.ranks] == [0]
    assert "two jobs" in report.unread[0].why


def test_two_devices_of_a_file_are_two_lanes(tmp_path):
    one = json.loads(write(tmp_path / "one.json", [(GEMM, 0, 100)], device=0).read_text())
    two = json.loads(write(tmp_path / "two.json", [(GEMM, 50, 100), (GEMM, 200, 100)], device=1).read_text())
    one["traceEvents"] += two["traceEvents"]
    for name in ("one.json", "two.json"):
        (tmp_path / name).unlink()
    (tmp_path / "both.json").write_text(json.dumps(one))
    report = analyse([tmp_path])
    assert [(r.lane, r.breakdown.whole.span, r.breakdown.whole.matmul) for r in report.ranks] == [
        (1, 250_000, 200_000),
        (0, 100_000, 100_000),
    ]
    assert "0 device 1" in render(report)


def test_collectives_that_do_not_meet_give_no_verdict(tmp_path):
    write(tmp_path / "rank0.json", steps(0, 3000), rank=0, first=0)
    write(tmp_path / "rank1.json", steps(0, 4000), rank=1, first=100)
    report = analyse([tmp_path])
    assert report.across.matched == 0
    assert not [v for v in report.verdicts if v.kind in ("straggler", "late")]
    assert "do not overlap" in report.across.withheld[0]


def column(ends, lengths=None, **more) -> Column:
    end = np.array(ends, np.int64)
    n = end.size
    none = np.full(n, -1, np.int64)
    length = np.full(n, 1_000_000) if lengths is None else np.array(lengths)
    return Column(
        end - length,
        end,
        np.ones(n, bool),
        np.zeros(n, np.int64),
        more.get("sequence", none),
        more.get("step", none),
    )


def test_ends_that_contradict_the_order_withhold_the_pairing():
    rng = np.random.default_rng(0)
    a, b = (column(np.cumsum(rng.integers(5e6, 9e7, 10))) for _ in range(2))
    assert isinstance(pair(a, b, True), str)
    assert isinstance(pair(a, b, False), str)


def test_a_sequence_that_the_ends_contradict_gives_way_to_the_ends():
    ends = np.cumsum(np.random.default_rng(1).integers(5e6, 9e7, 12))
    a = column(ends, sequence=np.arange(12))
    found = pair(a, column(ends + 777, sequence=np.arange(12) + 1), False)
    assert found.left.tolist() == found.right.tolist() == list(range(12))
    assert set(found.ahead.tolist()) == {777}


def test_equal_steps_shifted_by_one_are_ambiguous_unless_numbered():
    ends = np.arange(1, 9) * 10_000_000
    a, b = column(ends[:6]), column(ends[1:8] + 3)
    assert "shifted by a step" in pair(a, b, False)
    found = pair(column(ends[:6], step=np.arange(6)), column(ends[1:8] + 3, step=np.arange(1, 8)), False)
    assert found.left.tolist() == [1, 2, 3, 4, 5]
    assert found.right.tolist() == [0, 1, 2, 3, 4]


def test_a_tie_names_nobody(tmp_path):
    write_job(Job(ranks=4, steps=5, noise=0.0), tmp_path)
    across = analyse([tmp_path], critical=False).across
    assert [r.last for r in across.ranks] == [0, 0, 0, 0]


def test_generated_jobs_are_paired_right_and_the_right_rank_is_named():
    found = pairing_study(16)
    assert found["wrong_pairs"] == found["named_wrong"] == found["healthy_blamed"] == 0
    assert found["named_right"] == found["slow_jobs"] > 0


def test_the_late_rank_costs_what_the_others_waited(shared):
    report = analyse([shared / "dlrm8_v100_8ranks"])
    (late,) = [v for v in report.verdicts if v.kind == "late"]
    assert late.title == "rank 7 arrives last in 5 of 8 matched collectives"
    assert "35.54 ms" in late.evidence


def test_sampled_records_are_paired_by_their_ends(shared):
    across = analyse([shared / "hta/trace_filter"], critical=False).across
    assert across.matched == 5
    assert across.end_spread_ns < 1_000_000


@pytest.mark.parametrize(
    ("name", "ranks", "matched"),
    [
        ("c12_same_rank_cycles", [(0, 0), (0, 1)], None),
        ("c13_clock_skew", [(0, 0), (1, 0)], 6),
        ("c14_no_rank", [(6, 0), (7, 0)], 1),
        ("c29_two_cycles", [(0, 0), (0, 1), (1, 0), (1, 1)], 8),
        ("c35_no_common_seq", [(0, 0), (1, 0)], 0),
        ("c36_busbw", [(0, 0), (1, 0)], 20),
    ],
)
def test_cases_of_several_files(cases, name, ranks, matched):
    report = analyse([cases / name])
    assert [(r.rank, r.window) for r in report.ranks] == ranks
    assert (report.across.matched if report.across else None) == matched
    assert "inf" not in render(report)
    if name == "c36_busbw":
        got = {b.op: b.bus_gb_s for b in report.across.bandwidth}
        assert got == pytest.approx({"all_gather": 4.194, "reduce_scatter": 4.194, "all_to_all": 2.097,
                                     "broadcast": 4.194, "all_reduce": 4.194}, abs=0.01)  # fmt: skip
        assert all(r.last == 0 for r in report.across.ranks)
