"""Breakdown against known truths: synthetic ones exactly, recorded ones to the microsecond."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.profiler.trace.breakdown import break_down
from trainsys.profiler.trace.classify import (
    COMM,
    COMPUTE,
    COPY,
    MATMUL,
    axis_of,
    classify,
    comm_op,
)
from trainsys.profiler.trace.columns import Activities, CommMeta, RankTrace
from trainsys.profiler.trace.commlist import list_communications
from trainsys.profiler.trace.kernels import _percentile
from trainsys.profiler.trace.link import link_launches
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.reader import read_trace
from trainsys.profiler.trace.synthetic import Job, write_job


def whole(path):
    return analyse([path], critical=False).ranks[0].breakdown.whole


def rounded(t):
    return [
        round(getattr(t, k) / 1000)
        for k in ("matmul", "other_compute", "comm_exposed", "memcpy_exposed", "idle", "span")
    ]


def test_synthetic_job_to_the_nanosecond(slow_job):
    job, timeline, folder = slow_job
    report = analyse([folder], critical=False)
    assert [r.rank for r in report.ranks] == [0, 1, 2, 3]
    for r in report.ranks:
        w = r.breakdown.whole
        assert {k: getattr(w, k) for k in timeline.terms(0)} == timeline.terms(r.rank)
        assert w.by_axis == {"dp": w.comm_exposed}
        assert list(w.by_group.values()) == [w.comm_exposed]
        assert w.idle_by_cause["data"] == job.data_ns * (job.steps - 1)
        assert sum(s.span for s in r.breakdown.steps) == w.span
        assert [s.step for s in r.breakdown.steps] == list(range(job.steps))
        for s in [w, *r.breakdown.steps]:
            assert s.matmul + s.other_compute + s.comm_exposed + s.memcpy_exposed + s.idle == s.span
            assert sum(s.idle_by_cause.values()) == s.idle


@pytest.mark.parametrize(
    ("file", "truth"),
    [
        ("hta/df_index_resolver/df_index_resolver.json.gz", [414005, 206511, 357343, 22754, 732352, 1732965]),
        ("hta/nccl_parser_config/nccl_data.json.gz", [41212, 74444, 39559, 2285, 503051, 660551]),
        ("tracelens/resnet_act_checkpoint.json.gz", [6191, 19548, 55625, 2638, 2566, 86568]),
        ("tracelens/Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz", [16649, 28784, 0, 215, 4006, 49653]),
    ],
)
def test_recorded_traces_to_the_microsecond(shared, file, truth):
    t = whole(shared / file)
    assert rounded(t) == truth
    assert sum(truth[:5]) - t.span / 1000 == pytest.approx(0, abs=2)


def test_recorded_overlap_recompute_and_flops(shared):
    nccl = whole(shared / "hta/nccl_parser_config/nccl_data.json.gz")
    assert round(nccl.comm / 1000) == 46876
    assert nccl.overlap == pytest.approx(0.1561, abs=5e-5)
    assert nccl.by_axis == {"world": nccl.comm_exposed}
    resnet = whole(shared / "tracelens/resnet_act_checkpoint.json.gz")
    assert resnet.recompute == pytest.approx(4.12e6, abs=0.005e6)
    for rank, comm, overlap in ((0, 396199, 0.1495), (1, 379053, 0.1993)):
        t = whole(shared / f"hta/trace_filter/sampled_rank-{rank}.json.gz")
        assert t.comm == comm * 1000
        assert t.overlap == pytest.approx(overlap, abs=5e-5)
    qwen = analyse([shared / "tracelens/Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz"], critical=False).ranks[0]
    assert qwen.work.products == 5_514_572_490_752 or qwen.work.products // 10**9 == 5514
    assert qwen.mfu is not None
    assert qwen.mfu.value == pytest.approx(5.514e12 / (0.0496528 * 989.4e12), rel=1e-3)
    assert "989.4 TFLOP/s" in qwen.mfu.peak


def test_a_data_stall_is_seen_and_its_absence_too(shared):
    stalled, fed = (whole(next((shared / "kineto_dataloader").glob(f"*num_workers_{n}*"))) for n in (0, 4))
    assert stalled.idle / stalled.span == pytest.approx(0.313, abs=5e-4)
    assert stalled.idle_by_cause["data"] / stalled.span > 0.18
    assert fed.idle_by_cause["data"] / fed.span < 0.005


def device(rows, names, comm=None):
    """rows: (start, end, name index, stream, kind)."""
    at = np.array(rows, np.int64).reshape(-1, 5)
    n = len(at)
    none = np.full(n, -1, np.int64)
    return Activities(
        at[:, 0],
        at[:, 1],
        at[:, 2],
        at[:, 4],
        np.zeros(n, np.int64),
        at[:, 3],
        none,
        none.copy(),
        none.copy(),
        np.zeros(n, np.int64),
        none.copy() if comm is None else np.array(comm),
    )


NAMES = ["sm90_gemm", "at::native::vectorized_elementwise_kernel", "ncclDevKernel_AllReduce", "Memcpy DtoH"]
rows = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_terms_are_those_of_brute_force(raw):
    trace = RankTrace(None, 0, 1, names=list(NAMES))  # type: ignore[arg-type]
    trace.device = device(sorted((s, s + d, n, q, 1 if n == 3 else 0) for s, d, n, q in raw), NAMES)
    kinds = classify(trace)
    assert kinds.tolist() == [int(n) for n in trace.device.name]
    t = break_down(trace, kinds, link_launches(trace)).whole
    low, high = min(s for s, *_ in raw), max(s + d for s, d, *_ in raw)
    best = {COMPUTE: 0, MATMUL: 0, COMM: 0, COPY: 0, None: 0}
    comm = 0
    for instant in range(low, high):
        live = {n for s, d, n, _ in raw if s <= instant < s + d}
        best[next((k for k in (MATMUL, COMPUTE, COMM, COPY) if k in live), None)] += 1
        comm += COMM in live
    assert (t.matmul, t.other_compute, t.comm_exposed, t.memcpy_exposed, t.idle, t.comm) == (
        best[MATMUL],
        best[COMPUTE],
        best[COMM],
        best[COPY],
        best[None],
        comm,
    )


def test_metadata_beats_names_and_streams_come_last():
    trace = RankTrace(None, 0, 1, names=["custom_exchange", "sm90_gemm", "nccl_x", "mystery"])  # type: ignore[arg-type]
    trace.comm_meta = [CommMeta(op="allreduce", group="3", group_desc="mesh_tp")]
    trace.device = device(
        [(0, 5, 0, 1, 0), (1, 4, 1, 7, 0), (6, 9, 2, 20, 0), (10, 12, 3, 20, 0), (13, 15, 3, 7, 0)],
        None,
        [0, -1, -1, -1, -1],
    )
    assert classify(trace).tolist() == [COMM, MATMUL, COMM, COMM, COMPUTE]
    assert trace.said["assumed: kernels of unknown name on a communication stream communicate"] == 1


def test_axes_and_operations():
    described = {
        "TENSOR_MODEL_PARALLEL_GROUP": "tp",
        "DATA_PARALLEL_GROUP_WITH_CP": "dp",
        "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
        "EXPERT_MODEL_PARALLEL_GROUP": "ep",
        "CONTEXT_PARALLEL_GROUP": "cp",
        "mesh_dp_shard": "dp_shard",
        "mesh_tp": "tp",
        "mesh_dp_replicate": "dp_replicate",
        "mesh_pp": "pp",
        "mesh_cp": "cp",
        "mesh_ep": "ep",
        "default_pg": "world",
        "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "several",
        "mesh_dp_shard_cp": "dp_shard",
    }
    assert {d: axis_of(d) for d in described} == described
    assert [
        comm_op(n)
        for n in (
            "_allgather_base",
            "ncclDevKernel_ReduceScatter_Sum",
            "nccl:send 0->1",
            "all_to_allv",
            "allreduce",
        )
    ] == ["all_gather", "reduce_scatter", "send_recv", "all_to_all", "all_reduce"]


def test_gloo_runs_are_read_from_the_host(shared):
    folder = shared / "flight_recorder/gloo_3ranks_rank2_slow"
    totals = []
    for rank in range(3):
        trace = read_trace(folder / f"kg_rank{rank}.json")
        comms = list_communications(trace, classify(trace), link_launches(trace))
        totals.append(round((comms.end - comms.start).sum() / 1e6))
    assert totals == [152, 191, 51]
    report = analyse([folder / f"kg_rank{r}.json" for r in range(3)])
    assert [s.rank for s in report.across.stragglers] == [2]
    assert report.across.stragglers[0].cost_s == pytest.approx(0.030, abs=0.002)
    assert all("times are the host's" in " ".join(r.said) for r in report.ranks)


def test_launch_statistics(tmp_path):
    write_job(Job(ranks=1, steps=2, layers=2, elementwise_ns=5_000), tmp_path)
    launch = analyse([tmp_path], critical=False).ranks[0].launch
    assert (launch.linked, launch.unlinked) == (18, 0)
    assert launch.short_count == 8
    assert launch.short_ns == 8 * 5_000
    assert launch.queue_max > 1
    assert launch.graph_count == 0


def test_cuda_graph_kernels(tmp_path):
    events = [
        {
            "ph": "X",
            "cat": "cuda_runtime",
            "name": "cudaGraphLaunch",
            "pid": 1,
            "tid": 1,
            "ts": 1,
            "dur": 2,
            "args": {"correlation": 9},
        }
    ]
    events += [
        {
            "ph": "X",
            "cat": "kernel",
            "name": "k",
            "pid": 0,
            "tid": 7,
            "ts": 10 * i,
            "dur": 4,
            "args": {"correlation": 9, "stream": 7, "device": 0, "graph node id": i},
        }
        for i in range(1, 4)
    ]
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps({"traceEvents": events}))
    launch = analyse([path]).ranks[0].launch
    assert (launch.graph_count, launch.graph_ns) == (3, 12_000)


def test_hta_agrees_where_it_drops_and_rounds_nothing(shared):
    """HTA 0.5.0 on the eight DLRM ranks (one step, whole microseconds): idle, compute, other, span, overlap %."""
    hta = [
        (6419, 1034, 5556, 13009, 4.50),
        (6428, 1246, 11075, 18749, 2.47),
        (7046, 1068, 3236, 11350, 7.88),
        (8145, 1240, 9468, 18853, 3.31),
        (8887, 1126, 6576, 16589, 0.56),
        (9121, 1041, 6230, 16392, 0.64),
        (7051, 1051, 3308, 11410, 7.56),
        (8308, 1059, 1600, 10967, 9.51),
    ]
    for r, (idle, compute, other, span, overlap) in zip(
        analyse([shared / "dlrm8_v100_8ranks"], critical=False).ranks, hta, strict=True
    ):
        w = r.breakdown.whole
        got = [
            n / 1000 for n in (w.idle, w.matmul + w.other_compute, w.comm_exposed + w.memcpy_exposed, w.span)
        ]
        assert got == [idle, compute, other, span]
        assert round(100 * w.overlap, 2) == overlap
    steps = (
        analyse([shared / "hta/df_index_resolver/df_index_resolver.json.gz"], critical=False)
        .ranks[0]
        .breakdown.steps
    )
    # HTA leaves the last iteration out; on the others its compute time is the same to the microsecond.
    assert sum(t.matmul + t.other_compute for t in steps[:-1]) == 496_485_000


@given(st.lists(st.integers(-(10**6), 10**12), min_size=1, max_size=60), st.sampled_from([0.5, 0.95]))
def test_percentiles_of_launch_delays_are_numpys(values, share):
    column = np.array(values, np.int64)
    assert _percentile(column, share) == int(np.percentile(column, share * 100))
