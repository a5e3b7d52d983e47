"""`trainsys preflight`: before step 0, in seconds: is every node fit to train, and do they reach each other?

Every rank measures itself, rank 0 hears all and names the bad node: `trainsys.launch.preflight`.
"""

from __future__ import annotations

import math
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from trainsys.blame import note, this_node
from trainsys.config.loader import load_run
from trainsys.launch.bandwidth import AxisRate, expected, sent
from trainsys.launch.preflight import Report, judge
from trainsys.layout import Axis, Layout
from trainsys.parallel.mesh import Mesh
from trainsys.planner.cluster import load_cluster
from trainsys.telemetry.run_dir import versions
from trainsys.train.process import Process, process

_SECONDS = 0.2
_SIZE = {"cpu": 384, "cuda": 8192}
_COPY_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}
_REDUCE_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""On devices so much that latency is a few percent of it, also across nodes."""
_ROUNDS, _TIMES = 3, 4
"""The fastest of so many rounds of so many all-reduces in a row."""
_AXES: tuple[Axis, ...] = ("pp", "dp_replicate", "fsdp", "cp", "tp")


def preflight(path: str, overrides: Sequence[str] = ()) -> int:
    """Check the ranks that the environment describes; 0 if all are fit, 1 with a line for each problem on rank 0.

    A node that is bad beyond doubt is noted for the job, whose next attempt does without it. That a rank has no
    device is noted, and ends it, before it meets the others: see ``choose_device``.
    """
    cfg = load_run(path, overrides)
    cluster = load_cluster(cfg.launch.cluster) if cfg.launch.cluster else None
    with process(cfg.train, timeout_s=60.0) as proc:
        layout = Layout.resolve(cfg.parallel, proc.world)
        mesh = Mesh(layout, proc.device)
        axes = [axis for axis in _AXES if mesh[axis].size > 1]
        report = measure(proc, Path(cfg.telemetry.out))
        right, rates = _all_reduce(mesh, axes)
        report = replace(report, axes=rates)
        reports = proc.ranks.to_first(report)
        lines: list[str] = []
        if proc.rank == 0:
            nbytes = _REDUCE_BYTES[proc.device.type]
            problems = judge(reports, expected(cluster, layout, axes, nbytes) if cluster else None)
            lines = [str(problem) for problem in problems]
            if not right:
                lines.append("an all-reduce gives a wrong sum")
            for problem in problems:
                note(problem.host, f"pre-flight: {problem.text}", problem.sure)
            _tell(reports, lines)
        bad = proc.ranks.from_first(bool(lines))
    return 1 if bad else 0


def _tell(reports: Sequence[Report], lines: Sequence[str]) -> None:
    for line in lines:
        print(f"trainsys: preflight: {line}", file=sys.stderr)
    slowest: dict[str, float] = {}
    for rate in (rate for r in reports for rate in r.axes):
        slowest[rate.axis] = min(slowest.get(rate.axis, math.inf), rate.bytes_s)
    shown = "".join(f"; {axis} all-reduce {rate / 1e9:.3g} GB/s per rank" for axis, rate in slowest.items())
    state = f"{len(lines)} problem{'s' * (len(lines) > 1)}" if lines else "all fit"
    hosts = len({r.host for r in reports})
    print(f"trainsys: preflight: {len(reports)} ranks on {hosts} node{'s' * (hosts != 1)}: {state}{shown}")


def measure(proc: Process, folder: Path) -> Report:
    """This rank's report."""
    device = proc.device
    matmul, right = _matmul(device)
    memory, held = _memory(device)
    return Report(
        rank=proc.rank,
        host=this_node(),
        versions={"python": ".".join(map(str, sys.version_info[:3])), **versions()},
        on_devices=device.type == "cuda",
        matmul_flops=matmul,
        matmul_right=right,
        memory_bytes_s=memory,
        memory_right=held,
        clock_s=_clock(proc),
        free_bytes=_free(folder),
        sees_shared=_shared(proc, folder),
        folder=str(folder.absolute()),
    )


def _matmul(device: torch.device) -> tuple[float, bool]:
    """FLOP/s, and whether a product that is known is right: ones(n) times small whole numbers sums exactly."""
    n = _SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = (torch.arange(n, device=device) % 2).to(dtype).expand(n, n).contiguous()
    right = bool(((a @ b) == b * n).all())
    return 2.0 * n**3 * _rate(lambda: a @ b, device), right


def _memory(device: torch.device) -> tuple[float, bool]:
    """Bytes read and written a second by a copy, and whether the copy holds the pattern."""
    source = torch.arange(_COPY_BYTES[device.type] // 8, device=device, dtype=torch.int64)
    target = torch.zeros_like(source)
    rate = 2.0 * source.nbytes * _rate(lambda: target.copy_(source), device)
    return rate, bool(torch.equal(source, target))


def _rate(work: Callable[[], object], device: torch.device) -> float:
    """Calls of ``work`` a second, the fastest of what fits into the time: others may share the machine."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now > end:
            return 1.0 / best


def _clock(proc: Process) -> float:
    """This host's clock less that of rank 0, read after a barrier."""
    proc.ranks.barrier()
    own = time.time()
    return own - proc.ranks.from_first(own)


def _free(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _shared(proc: Process, folder: Path) -> bool:
    """Whether a file that rank 0 writes is seen here."""
    file = folder / f".preflight-{proc.ranks.from_first(secrets.token_hex(8))}"
    with suppress(OSError):
        if proc.rank == 0:
            file.touch()
    proc.ranks.barrier()
    seen = file.exists()
    proc.ranks.barrier()
    with suppress(OSError):
        if proc.rank == 0:
            file.unlink()
    return seen


def _all_reduce(mesh: Mesh, axes: Sequence[Axis]) -> tuple[bool, tuple[AxisRate, ...]]:
    """Whether sums over each axis are right, and their rates; all groups of an axis work at once, as in training."""
    right, rates = True, []
    for axis in axes:
        group = mesh[axis]
        x = torch.full((_REDUCE_BYTES[mesh.device.type] // 4,), float(group.index + 1), device=mesh.device)
        dist.all_reduce(x, group=group.group)  # and the first use sets up its channels
        right &= bool((x == group.size * (group.size + 1) / 2).all())
        x.zero_()
        best = math.inf
        for _ in range(_ROUNDS):
            dist.barrier()
            best = min(
                best, _seconds(lambda x=x, group=group: dist.all_reduce(x, group=group.group), mesh.device)
            )
        rates.append(AxisRate(axis, group.ranks, sent(x.nbytes, group.size) / best))
    verdict = torch.tensor(float(right), device=mesh.device)
    if mesh.layout.world > 1:
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict), tuple(rates)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call, over several in a row. On a device by its own clock: a host that waits for each adds
    the launch latency, which is as long as a small all-reduce."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        work()  # the others have come out of the barrier by its end
        first.record()
        for _ in range(_TIMES):
            work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / _TIMES
    started = time.perf_counter()
    for _ in range(_TIMES):
        work()
    return (time.perf_counter() - started) / _TIMES
