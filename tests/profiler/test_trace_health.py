"""What a recording lacks is said first, what it spoils is withheld; other formats are read, or refused in one line."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from trainsys.errors import UserError
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.optimeline import TimelineReport
from trainsys.profiler.trace.text import render
from trainsys.profiler.trace.verdicts import timeline_verdicts

CASES = Path(__file__).resolve().parents[2] / "../shared/data/cases/traces"
GEMM, ADD = "ampere_bf16_s16816gemm_bf16_128x128", "void at::native::vectorized_elementwise_kernel<4, add>"
T0 = 1_700_000_000_000_000


def kernel(ts, dur, name=GEMM, correlation=-1, stream=7, cat="kernel"):
    args = {"device": 0, "stream": stream, "correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur, "args": args}


def call(ts, name="cudaLaunchKernel", correlation=-1, dur=5):
    args = {"correlation": correlation}
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": name,
        "pid": 9,
        "tid": 9,
        "ts": ts,
        "dur": dur,
        "args": args,
    }


def report_of(tmp_path, events, name="trace.json"):
    path = tmp_path / name
    path.write_text(
        json.dumps(
            {"schemaVersion": 1, "distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": events}
        )
    )
    return analyse([path])


def texts(report):
    return [f.text for r in report.ranks for f in r.health]


@pytest.mark.parametrize("bad", [0, 1, 2**62 // 10**6])
def test_times_of_no_recording_are_left_out_and_said(tmp_path, bad):
    report = report_of(tmp_path, [kernel(T0, 50), kernel(bad, 0), kernel(T0 + 60, 40, ADD), kernel(bad, 3)])
    assert report.ranks[0].breakdown.whole.span == 100_000
    assert any("2 events have no time" in t for t in texts(report))


def test_graph_launches_without_kernels_withhold_idle_verdicts(tmp_path):
    events = [call(T0, correlation=1), kernel(T0 + 10, 10, correlation=1)]
    events += [
        call(T0 + 20, "cudaGraphLaunch", 2),
        call(T0 + 5000, correlation=3),
        kernel(T0 + 5010, 10, correlation=3),
    ]
    report = report_of(tmp_path, events)
    assert any("1 of 1 CUDA graph launches have no kernels" in t for t in texts(report))
    assert report.critical is None
    assert not [v for v in report.verdicts if v.kind == "idle"]


def test_dropped_records_are_said(tmp_path):
    events = []
    for i in range(20):
        events.append(call(T0 + 100 * i, correlation=i))
        if i % 5:
            events.append(kernel(T0 + 100 * i + 10, 50, correlation=i))
    assert any("4 of 20 kernel launches" in t for t in texts(report_of(tmp_path, events)))


def test_kernels_that_overlap_on_one_stream_spoil_every_figure(tmp_path):
    events = [e for i in range(20) for e in (kernel(T0 + 100 * i, 90), kernel(T0 + 100 * i + 20, 90, ADD))]
    report = report_of(tmp_path, events)
    assert "overlap another on their own stream" in texts(report)[0]
    assert report.verdicts == []
    assert report.critical is None
    assert render(report).startswith("Trace health")
    other = [e | {"args": {**e["args"], "stream": 8}} if e["name"] == ADD else e for e in events]
    assert not any("overlap" in t for t in texts(report_of(tmp_path, other)))


@pytest.mark.parametrize("character", ["\t", "\n", "\x01"])
def test_control_characters_lose_no_event(tmp_path, character):
    path = tmp_path / "t.json"
    text = json.dumps({"traceEvents": [kernel(T0, 50, "my_kernel@x"), kernel(T0 + 50, 50)]}, indent=1)
    path.write_text(text.replace("@", character))
    (rank,) = analyse([path]).ranks
    assert [k.name for k in rank.kernels] == ["my_kernel x", GEMM] or {k.name for k in rank.kernels} == {
        "my_kernel x",
        GEMM,
    }


def test_terminal_escapes_do_not_reach_the_terminal(tmp_path):
    report = report_of(tmp_path, [kernel(T0, 50, "evil\x1b[2J\x1b[31mkernel")])
    assert "\x1b" not in render(report)


def test_what_holds_no_activity_is_refused_with_what_to_record(tmp_path):
    meta = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0, "args": {"name": "python"}}]
    with pytest.raises(UserError, match=r"ProfilerActivity\.CUDA"):
        report_of(tmp_path, meta)
    with pytest.raises(UserError, match="no events in it"):
        report_of(tmp_path, [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.nsys-rep", "nsys export --type sqlite"),
        ("a.xplane.pb", "trace.json.gz"),
        ("a.ncu-rep", "timeline"),
        ("a.pftrace", "JSON"),
    ],
)
def test_other_files_are_refused_with_what_to_export(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"\x0a\x00binary")
    with pytest.raises(UserError, match=words):
        analyse([tmp_path / name])


def track(pid, name, tid=None):
    kind = "process_name" if tid is None else "thread_name"
    return {"ph": "M", "pid": pid, "tid": tid or 0, "name": kind, "args": {"name": name}}


def test_jax_devices_are_read_by_their_tracks(tmp_path):
    events = [track(1, "/device:GPU:0"), track(1, "Stream #1(Compute)", 1), track(1, "XLA Ops", 2),
              track(3, "/device:GPU:1"),
              track(3, "Stream #1(Compute)", 1), track(2, "/host:CPU")]  # fmt: skip
    events += [{"ph": "X", "pid": p, "tid": t, "ts": ts, "dur": 50, "name": n, "args": {}} for p, t, ts, n in (
        (1, 1, 100, "gemm_fusion_dot.3"), (1, 2, 100, "dot.3"), (1, 1, 160, "ncclDevKernel_AllReduce"),
        (3, 1, 100, "loop_add_fusion"),
        (2, 9, 0, "PjitFunction(f)"))]  # fmt: skip
    path = tmp_path / "jax.trace.json"
    path.write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": events}))
    first, second = analyse([path]).ranks
    whole = first.breakdown.whole
    assert (whole.matmul, whole.comm, whole.idle) == (50_000, 50_000, 10_000)
    assert (second.lane, second.breakdown.whole.other_compute) == (1, 50_000)


def test_a_tpu_has_only_its_ops(tmp_path):
    events = [track(1, "/device:TPU:0"), track(1, "XLA Ops", 2), track(1, "XLA Modules", 3)]
    events += [
        {"ph": "X", "pid": 1, "tid": t, "ts": 0, "dur": d, "name": n}
        for t, d, n in ((2, 50, "dot.1"), (3, 99, "jit_f"))
    ]
    path = tmp_path / "tpu.json"
    path.write_text(json.dumps({"traceEvents": events}))
    (rank,) = analyse([path]).ranks
    assert (rank.breakdown.whole.matmul, rank.breakdown.whole.span) == (50_000, 50_000)


def nsight(path, rows):
    with sqlite3.connect(path) as base:
        base.executescript(
            "CREATE TABLE StringIds (id INT, value TEXT);"
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT, correlationId INT,"
            " demangledName INT, shortName INT);"
            "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, correlationId INT, nameId INT);"
            "CREATE TABLE NVTX_EVENTS (start INT, end INT, text TEXT, textId INT, globalTid INT);"
            "CREATE TABLE TARGET_INFO_GPU (id INT, name TEXT, totalMemory INT);"
            "INSERT INTO TARGET_INFO_GPU VALUES (0, 'NVIDIA H100 80GB HBM3', 85000000000);"
            "INSERT INTO StringIds VALUES (0, 'cudaLaunchKernel_v7000');"
        )
        for i, (start, end, name, stream) in enumerate(rows, 1):
            base.execute("INSERT INTO StringIds VALUES (?, ?)", (i, name))
            base.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?,?,0,?,?,?,?)", (start, end, stream, i, i, i)
            )
            base.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?,?,1,?,0)", (start - 20, start - 10, i)
            )
        base.execute("INSERT INTO NVTX_EVENTS VALUES (0, 900, 'ProfilerStep#3', NULL, 1)")
    base.close()


def test_nsight_sqlite_is_read(tmp_path):
    path = tmp_path / "rank1.sqlite"
    nsight(path, [(100, 400, GEMM, 7), (410, 600, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 20)])
    (rank,) = analyse([path]).ranks
    whole = rank.breakdown.whole
    assert (rank.rank, rank.device) == (1, "NVIDIA H100 80GB HBM3")
    assert (whole.span, whole.matmul, whole.comm_exposed, whole.idle) == (500, 300, 190, 10)
    assert [t.step for t in rank.breakdown.steps] == [3]
    assert rank.launch.linked == 2


def test_another_database_is_refused_with_what_to_export(tmp_path):
    path = tmp_path / "x.sqlite"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE notes (x INT)")
    base.close()
    with pytest.raises(UserError, match="nsys export --type sqlite"):
        analyse([path])


def test_an_op_timeline_names_the_slow_worker(shared):
    pytest.importorskip("pyarrow")
    report = analyse([shared / "bytedance_straggler/trace-AR.parquet"])
    (line,) = report.timelines
    assert line.worst == [(0, 0)]
    assert line.worst_gives_back == pytest.approx(1.0, abs=0.01)
    assert report.verdicts[0].title.startswith("data rank 0 stage 0: ")


@pytest.mark.parametrize(
    ("worst", "last", "title"),
    [
        (1.22, 0.0, "data rank 0 stage 3: all of the lost time is gone without what is slow there"),
        (0.1, 1.22, "all of the lost time is the last stage's"),
        (0.1, 0.688, "68.8% of the lost time is the last stage's"),
    ],
)
def test_no_more_than_all_of_the_lost_time_is_somebodys(worst: float, last: float, title: str) -> None:
    """A job that ByteDance published loses 122% to its last stage: without it the others beat the mean."""
    line = TimelineReport("x", 8, 32, 2.17, 1.18, [(0, 3)], worst, last, {"forward-compute": 1.09})
    (verdict,) = timeline_verdicts(line)
    assert verdict.title == title


def test_the_host_holds_up_only_an_idle_device(tmp_path):
    """Reading a result every step: no synchronising call is in the trace, and the device is busy all but 5 us a step."""
    events, at = [], T0
    for i in range(20):
        events += [call(at, correlation=i), kernel(at + 5, 1000, correlation=i)]
        at += 1010
    report = report_of(tmp_path, events)
    c, whole = report.critical, report.ranks[0].breakdown.whole
    assert sum(c.by_kind.values()) == c.span_ns
    assert sum(c.by_kind.get(k, 0) for k in ("host", "data", "sync", "launch")) <= whole.idle
    faster = next(w for w in c.what_if if "matmuls" in w.what)
    assert faster.saved_ns == pytest.approx(whole.matmul / 6, rel=0.1)


def test_a_what_if_never_contradicts_the_idle_share(shared):
    for name in ("hta/df_index_resolver", "tracelens"):
        report = analyse(sorted((shared / name).iterdir())[:1])
        whole = report.ranks[0].breakdown.whole
        for w in report.critical.what_if:
            assert "host" not in w.what or w.saved_ns <= whole.idle


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("c02_ts_zero", (100, 50, 40, 0, 0)),
        ("c03_inf_bandwidth", (50, 50, 0, 0, 0)),
        ("c06_graph_critical", (25_750, 24_500, 50, 0, 0)),
        ("c07_dur_minus1", (130, 50, 30, 0, 0)),
        ("c08_step_overlap", (1900, 1800, 0, 0, 0)),
        ("c09_control_char", (50, 50, 0, 0, 0)),
        ("c16_jax", (110, 50, 0, 50, 0)),
        ("c17_ascend_trace_view", (89.9, 50.5, 0, 30, 0)),
        ("c18_ptop_comm", (3990, 800, 0, 3000, 0)),
        ("c32_inductor_names", (19_950, 4000, 12_000, 3000, 0)),
        ("c44_fbgemm_namespace", (1000, 200, 800, 0, 0)),
    ],
)
def test_cases_give_these_terms(name, terms):
    if not CASES.is_dir():
        pytest.skip("../shared/data/cases is not here")
    (path,) = CASES.glob(f"{name}*")
    whole = analyse([path]).ranks[0].breakdown.whole
    got = (whole.span, whole.matmul, whole.other_compute, whole.comm_exposed, whole.memcpy_exposed)
    assert [g / 1000 for g in got] == pytest.approx(terms, abs=0.01)


def test_the_other_cases():
    if not CASES.is_dir():
        pytest.skip("../shared/data/cases is not here")
    with pytest.raises(UserError, match=r"ProfilerActivity\.CUDA"):
        analyse([CASES / "c01_metadata_only.json"])
    report = analyse([CASES / "c42_interleaved_write.json"])
    assert "overlap another" in texts(report)[0]
    assert report.verdicts == []
