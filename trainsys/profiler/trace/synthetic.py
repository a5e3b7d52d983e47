"""Traces with a known answer, of any size: for tests, and for showing how time and memory grow.

A synchronous data-parallel job: each step the host loads data, then every layer launches a matrix product and
two elementwise kernels and all-reduces over the rank's group; a step ends with a copy. Everything is simulated
in integer nanoseconds for all ranks at once, so waiting, arrival order and every term of the breakdown are
known exactly, and the files are written in the layout that PyTorch's profiler uses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal import igzip

from trainsys.profiler.trace.intervals import Ints

BASE_NS = 1_790_000_000_000_000_000
_LAUNCH, _LATENCY = 4_000, 1_500
PRODUCT = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >"
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@dataclass(frozen=True)
class Job:
    """``slow``: rank -> factor on its kernels. ``clock_ns``: host -> offset of its clock, ns. Times in ns."""

    ranks: int = 4
    steps: int = 3
    layers: int = 4
    group: int = 0
    """Ranks of one all-reduce group, in order; 0: all."""
    product_ns: int = 400_123
    elementwise_ns: int = 30_457
    reduce_ns: int = 120_001
    copy_ns: int = 5_500
    data_ns: int = 250_000
    slow: dict[int, float] = field(default_factory=dict)
    clock_ns: dict[int, int] = field(default_factory=dict)
    ranks_per_host: int = 8
    noise: float = 0.0
    fill: int = 0
    """Host operators written beside each launch, to give the files a real trace's bulk."""
    seed: int = 0
    elements: int = 1 << 20
    drift_ppm: dict[int, float] = field(default_factory=dict)
    """Host -> by how much its clock runs fast, parts per million."""
    missing: float = 0.0
    """Share of the all-reduces that a rank's recorder lost."""
    sampled: int = 0
    """Steps in a row that each rank recorded, from one of its own; 0: all."""
    sequence: bool = False
    """All-reduces carry their sequence number."""
    marks: bool = True
    """Steps are annotated."""
    host_names: bool = True

    def clock(self, rank: int, ns: int) -> int:
        """What the clock of a rank's host shows at a true time, ns."""
        host = rank // self.ranks_per_host
        return ns + self.clock_ns.get(host, 0) + round(ns * self.drift_ppm.get(host, 0.0) * 1e-6)

    def recorded(self, rank: int) -> range:
        """The steps that a rank recorded."""
        first = 0
        if self.sampled:
            first = int(
                np.random.default_rng((self.seed, rank, 1)).integers(0, self.steps - self.sampled + 1)
            )
        return range(first, first + (self.sampled or self.steps))

    def members(self, rank: int) -> list[int]:
        size = self.group or self.ranks
        first = rank - rank % size
        return list(range(first, min(first + size, self.ranks)))


@dataclass
class Timeline:
    """Starts and ends, ns from ``BASE_NS``, true time. Kernels [R, steps, layers, 4]; copies and data [R, steps, 2].

    The four of a layer: product, elementwise, all-reduce, elementwise.
    """

    start: Ints
    end: Ints
    copy: Ints
    data: Ints
    step: Ints

    def terms(self, rank: int) -> dict[str, int]:
        """The breakdown this rank's trace must give."""
        length = (self.end - self.start)[rank]
        copies = int((self.copy[rank, :, 1] - self.copy[rank, :, 0]).sum())
        span = int(self.copy[rank, -1, 1] - self.start[rank, 0, 0, 0])
        matmul, comm = int(length[..., 0].sum()), int(length[..., 2].sum())
        other = int(length[..., 1].sum() + length[..., 3].sum())
        return {
            "span": span,
            "matmul": matmul,
            "other_compute": other,
            "comm_exposed": comm,
            "memcpy_exposed": copies,
            "idle": span - matmul - other - comm - copies,
        }

    def waits(self, members: list[int]) -> Ints:
        """ns each member waits in each all-reduce of its group. [collectives, members]"""
        length = (self.end - self.start)[members][..., 2].reshape(len(members), -1).T
        return np.asarray(length - length.min(axis=1, keepdims=True))


def simulate(job: Job) -> Timeline:
    rng = np.random.default_rng(job.seed)
    r = job.ranks
    shape = (r, job.steps, job.layers, 4)
    start, end = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    copy, data, step = (np.zeros((r, job.steps, 2), np.int64) for _ in range(3))
    slow = np.array([job.slow.get(i, 1.0) for i in range(r)])
    host = np.full(r, 1_000_000, np.int64)
    group = np.array([job.members(i)[0] for i in range(r)])

    def lasting(ns: int) -> Ints:
        jitter = rng.lognormal(0.0, job.noise, r) if job.noise else 1.0
        return np.asarray(np.rint(ns * slow * jitter), np.int64)

    for s in range(job.steps):
        step[:, s, 0] = host
        data[:, s, 0], data[:, s, 1] = host + 10_000, host + 10_000 + job.data_ns
        now = data[:, s, 1] + _LAUNCH + _LATENCY
        for layer in range(job.layers):
            for k, ns in ((0, job.product_ns), (1, job.elementwise_ns)):
                start[:, s, layer, k], now = now, now + lasting(ns)
                end[:, s, layer, k] = now
                now = now + _LATENCY
            arrived = np.array([now[group == g].max() for g in group])
            start[:, s, layer, 2], end[:, s, layer, 2] = now, arrived + job.reduce_ns
            now = end[:, s, layer, 2] + _LATENCY
            start[:, s, layer, 3], now = now, now + lasting(job.elementwise_ns)
            end[:, s, layer, 3] = now
            now = now + _LATENCY
        copy[:, s, 0], copy[:, s, 1] = now, now + job.copy_ns
        host = copy[:, s, 1] + 20_000
        step[:, s, 1] = host
    return Timeline(start, end, copy, data, step)


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


class _Writer:
    """One rank's events as text, in the order and layout of Kineto's own writer."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self.lost = np.random.default_rng((job.seed, rank, 2))
        self.correlation = 0
        members = job.members(rank)
        self.group = (
            f'"Collective name": "allreduce", "In msg nelems": {job.elements}, "Out msg nelems": {job.elements}, '
            f'"Group size": {len(members)}, "dtype": "BFloat16", "Process Group Name": "{members[0]}", '
            f'"Process Group Description": "mesh_dp", "Process Group Ranks": "{members}"'
        )

    def event(self, cat: str, name: str, pid: int, tid: int, start: int, end: int, args: str) -> str:
        begin, finish = self.job.clock(self.rank, start), self.job.clock(self.rank, end)
        return (
            f'  {{\n    "ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid},\n'
            f'    "ts": {_us(begin)}, "dur": {_us(finish - begin)},\n    "args": {{\n      {args}\n    }}\n  }}'
        )

    def activity(
        self, cat: str, name: str, stream: int, start: int, end: int, extra: str, launched: int
    ) -> list[str]:
        self.correlation += 1
        c = self.correlation
        out = [
            self.event(
                "cpu_op",
                "aten::add_",
                4000,
                4000,
                launched - 900 + 7 * i,
                launched - 890 + 7 * i,
                f'"External id": {c},"Record function id": 0, "Concrete Inputs": ["", "", "1"], "Input type": '
                '["c10::BFloat16", "c10::BFloat16", "Scalar"], "Input Strides": [[4096, 1], [4096, 1], []], '
                f'"Input Dims": [[8192, 4096], [8192, 4096], []], "Ev Idx": {c * 8 + i}',
            )
            for i in range(self.job.fill)
        ]
        call = "cudaMemcpyAsync" if cat == "gpu_memcpy" else "cudaLaunchKernel"
        out.append(
            self.event(
                "cuda_runtime",
                call,
                4000,
                4000,
                launched,
                launched + 3_000,
                f'"External id": {c}, "cbid": 211, "correlation": {c}',
            )
        )
        out.append(
            self.event(
                cat,
                name,
                0,
                stream,
                start,
                end,
                f'"External id": {c}, "device": 0, "context": 1, "stream": {stream}, "correlation": {c}{extra}',
            )
        )
        out.append(
            f'  {{\n    "ph": "s", "id": {c}, "pid": 4000, "tid": 4000, '
            f'"ts": {_us(self.job.clock(self.rank, launched))},\n'
            '    "cat": "ac2g", "name": "ac2g"\n  }'
        )
        return out


def write_rank(job: Job, timeline: Timeline, rank: int, path: Path) -> None:
    """One trace file (gzip if named ``.gz``), step by step: memory does not grow with the file."""
    writer = _Writer(job, rank)
    head = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85017886720}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": job.ranks},
        "host_name": f"host{rank // job.ranks_per_host}" if job.host_names else "",
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": BASE_NS,
    }
    zipped = path.suffix == ".gz"
    with igzip.open(path, "wt", compresslevel=1) if zipped else path.open("w") as file:  # type: ignore[no-untyped-call]
        file.write(json.dumps(head)[:-1] + ',\n"traceEvents": [\n')
        steps = job.recorded(rank)
        for s in steps:
            file.write(
                ",\n".join(_step(job, timeline, rank, s, writer)) + (",\n" if s != steps[-1] else "\n")
            )
        file.write('],\n"traceName": "synthetic"\n}\n')


def _step(job: Job, t: Timeline, rank: int, s: int, writer: _Writer) -> list[str]:
    begin, finish = (int(x) for x in t.step[rank, s])
    mark = f"ProfilerStep#{s}"
    marks = [writer.event("user_annotation", mark, 4000, 4000, begin, finish, '"External id": 0')]
    out = [
        *(marks if job.marks else []),
        writer.event(
            "user_annotation",
            "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__",
            4000,
            4000,
            int(t.data[rank, s, 0]),
            int(t.data[rank, s, 1]),
            '"External id": 0',
        ),
    ]
    launched = int(t.data[rank, s, 1])
    for layer in range(job.layers):
        for k, (name, stream, extra) in enumerate(
            ((PRODUCT, 7, ""), (ELEMENTWISE, 7, ""), (REDUCE, 20, ", " + writer.group), (ELEMENTWISE, 7, ""))
        ):
            if k == 2:
                if job.missing and writer.lost.random() < job.missing:
                    continue
                extra += f', "Seq": {s * job.layers + layer}' if job.sequence else ""
            out += writer.activity(
                "kernel",
                name,
                stream,
                int(t.start[rank, s, layer, k]),
                int(t.end[rank, s, layer, k]),
                extra,
                launched,
            )
            launched += _LAUNCH
    out += writer.activity(
        "gpu_memcpy",
        "Memcpy DtoH (Device -> Pinned)",
        7,
        int(t.copy[rank, s, 0]),
        int(t.copy[rank, s, 1]),
        ', "bytes": 4',
        launched,
    )
    out.append(
        writer.event(
            "cuda_runtime",
            "cudaStreamSynchronize",
            4000,
            4000,
            launched + _LAUNCH,
            int(t.copy[rank, s, 1]) + 5_000,
            '"External id": 0, "cbid": 131, "correlation": 0',
        )
    )
    return out


def write_job(job: Job, folder: Path, *, suffix: str = ".json") -> Timeline:
    """All ranks' files, ``rank00000.json`` and so on, in ``folder``; returns the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    timeline = simulate(job)
    for rank in range(job.ranks):
        write_rank(job, timeline, rank, folder / f"rank{rank:05d}{suffix}")
    return timeline
