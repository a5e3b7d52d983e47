"""Kineto on Intel GPUs: kernels of SYCL queues, launches by two interfaces, waits in a category of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainsys.profiler.trace.main import analyse

QUEUE, COMM_QUEUE = 3, 9


def host(category: str, name: str, ts: float, length: float, correlation: int) -> dict[str, Any]:
    args = {"correlation": correlation, "External id": 5}
    return {"ph": "X", "cat": category, "name": name, "pid": 4242, "tid": 77, "ts": ts, "dur": length, "args": args}


def device(category: str, name: str, ts: float, length: float, correlation: int) -> dict[str, Any]:
    queue = COMM_QUEUE if "ccl" in name else QUEUE
    args = {"correlation": correlation, "device": 0, "sycl queue": queue, "context": "0xaa", "kernel_id": correlation}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": queue, "ts": ts, "dur": length, "args": args}


def test_xpu_time_is_accounted_for(tmp_path: Path) -> None:
    work = [
        ("kernel", "gemm_kernel", 200),
        ("kernel", "at::native::xpu::VectorizedElementwiseKernel<4, at::native::xpu::AddFunctor<float>>", 50),
        ("kernel", "micro_sdpa", 100),
        ("gpu_memcpy", "Memcpy H2D (Host -> Device)", 30),
        ("kernel", "oneccl_allreduce_pcie_kernel", 80),
    ]
    events, at = [], 1000.0
    for i, (category, name, length) in enumerate(work):
        events.append(host("xpu_runtime", "urEnqueueKernelLaunch", at - 900, 5, i))
        events.append(host("xpu_driver", "zeCommandListAppendLaunchKernel", at - 899, 3, i))
        events.append(device(category, name, at, length, i))
        at += length
    # The host waits for the last one, and launches again 40 us after.
    events.append(host("xpu_sync", "zeEventHostSynchronize", at - 50, 50, 90))
    events.append(host("xpu_runtime", "urEnqueueKernelLaunch", at + 40, 5, 91))
    events.append(device("kernel", "gen_conv_kernel", at + 50, 40, 91))
    path = tmp_path / "xpu.json"
    info = {"backend": "xccl", "rank": 0, "world_size": 1}
    path.write_text(json.dumps({"traceEvents": events, "distributedInfo": info}))
    report = analyse([path])
    rank = report.ranks[0]
    assert rank.breakdown is not None
    whole = rank.breakdown.whole
    terms = (whole.matmul, whole.other_compute, whole.comm_exposed, whole.memcpy_exposed, whole.idle)
    assert terms == (340_000, 50_000, 80_000, 30_000, 50_000)
    assert whole.idle_by_cause == {"sync": 40_000, "launch": 10_000}
    assert rank.health == []
    assert rank.launch.unlinked == 0
