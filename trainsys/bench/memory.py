"""This machine's memory bandwidth: N processes copying at once, each what no cache holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from trainsys.bench.together import Work, combined_rate, refuse, run_together, threads_each

# Several times the last-level cache of the largest CPUs per process would not fit small hosts; 64 MiB each
# way is twice a common one, and GPUs need more to hide the launch.
_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class CopyBandwidth:
    """``bytes_per_s`` of all processes together, a copied byte counting twice: read and written."""

    device: str
    processes: int
    threads: int
    bytes_per_s: float


def _make(_variant: int, device: torch.device) -> Work:
    size = _BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(partial(target.copy_, source), 2.0 * size)


def measure_copy(
    processes: int = 1, seconds: float = 1.0, device: str = "cpu", threads: int | None = None
) -> CopyBandwidth:
    """Copy bandwidth at a process count; arguments as for ``measure_matmul``.

    Raises:
        UserError: an argument that cannot be measured here.
        RuntimeError: a process failed.
    """
    threads = threads_each(processes, threads)
    refuse("bench memory", processes, threads, seconds, device)
    (stamps,) = run_together(_make, 1, processes=processes, threads=threads, seconds=seconds, device=device)
    return CopyBandwidth(device, processes, threads, combined_rate(stamps))


def run_cli(
    processes: list[int],
    seconds: float = 1.0,
    device: str = "cpu",
    threads: int | None = None,
    as_json: bool = False,
) -> None:
    """``trainsys bench memory``: measure at every process count and print."""
    results = [measure_copy(p, seconds, device, threads) for p in processes]
    if as_json:
        print(json.dumps([asdict(r) for r in results], indent=1))
        return
    table = Table(title=f"Memory copy, {device}: bytes read and written")
    for column in ("processes", "threads each", "GB/s together", "each"):
        table.add_column(column, justify="right")
    for r in results:
        rate = r.bytes_per_s / 1e9
        table.add_row(str(r.processes), str(r.threads), f"{rate:,.1f}", f"{rate / r.processes:,.1f}")
    Console().print(table)
