"""This machine's matmul ceiling at a process count and dtype: the peak of MFU where no catalogue has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from trainsys.bench.together import Work, fastest_rate, refuse, repeat, run_together, threads_each
from trainsys.errors import UserError
from trainsys.hardware.catalogue import DType
from trainsys.hardware.machine import usable_cores
from trainsys.hardware.measured import (
    Measurement,
    MeasurementKey,
    load_measurement,
    store_measurement,
)

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# (m, n, k). A CPU core is at its best while both factors stay in its cache, and with little to sum over: small models
# have such products, and beat a ceiling that is of large ones alone. A GPU needs waves that fill its multiprocessors.
_SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "cpu": ((512, 384, 128), (512, 512, 512), (256, 1024, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
}


def _make(dtype: str, variant: int, device: torch.device) -> Work:
    m, n, k = _SHAPES[device.type][variant]
    # Random values: a GPU multiplies zeros at a lower power, hence a higher clock, than training ever sees.
    # The second factor is stored [n, k] as a linear layer's weight is.
    a = torch.randn(m, k, device=device).to(_TORCH_DTYPES[dtype])
    b = torch.randn(n, k, device=device).to(_TORCH_DTYPES[dtype])
    out = torch.empty(m, n, device=device, dtype=_TORCH_DTYPES[dtype])
    return Work(partial(torch.mm, a, b.t(), out=out), 2.0 * m * n * k)


def _key(dtype: DType, processes: int, threads: int, device: str) -> MeasurementKey:
    name = torch.cuda.get_device_name() if device == "cuda" else None
    return MeasurementKey.here(dtype, processes, threads, name)


def measure_matmul(
    dtype: DType,
    processes: int = 1,
    seconds: float = 1.0,
    device: str = "cpu",
    threads: int | None = None,
) -> Measurement:
    """Measure and store the ceiling of ``processes`` processes that multiply at the same time.

    Args:
        dtype: fp32, bf16 or fp16; fp32 as torch is set to compute it (on CUDA without TF32 by default).
        seconds: how long each shape runs.
        threads: CPU threads of each process; None: see ``threads_each``.

    Raises:
        UserError: an argument that cannot be measured here.
        RuntimeError: a process failed.
    """
    threads = threads_each(processes, threads)
    if dtype not in _TORCH_DTYPES:
        raise UserError(f"bench matmul: dtype {dtype!r} is not measured; one of {', '.join(_TORCH_DTYPES)}")
    refuse("bench matmul", processes, threads, seconds, device)
    shapes = _SHAPES[device]
    stamps = run_together(
        partial(_make, dtype),
        len(shapes),
        processes=processes,
        threads=threads,
        seconds=seconds,
        device=device,
    )
    room = _room(processes, threads, usable_cores(), device)
    rates = [room * sum(map(fastest_rate, of_shape)) for of_shape in stamps]
    best = max(range(len(rates)), key=rates.__getitem__)
    measurement = Measurement(
        key=_key(dtype, processes, threads, device),
        flops_per_s=rates[best],
        shape=shapes[best],
        seconds=seconds,
    )
    store_measurement(measurement)
    return measurement


def ceiling_in_run(
    dtype: DType,
    processes: int,
    *,
    barrier: Callable[[], None],
    total: Callable[[float], float],
    device: torch.device,
    store: bool,
    seconds: float = 0.5,
    cores: int | None = None,
) -> Measurement:
    """The ceiling of a running job: from the store if every rank finds it there, else measured by all at once.

    Every rank calls this, before the first step. Nothing of it is asked of other ranks but the two calls:

    Args:
        processes: ranks on this host; on one host the result is over these, on several over all ranks.
        barrier: returns when every rank has called it.
        total: the sum over ranks of a float.
        store: whether this rank writes the store (one rank, of a job on one host).
        seconds: of measuring in all, if it must be measured.
        cores: of this host, for all its ranks; None: those that this process may use.
    """
    world = round(total(1.0))
    room = _room(processes, torch.get_num_threads(), cores or usable_cores(), device.type)
    key = _key(dtype, processes, torch.get_num_threads(), device.type)
    known = load_measurement(key)
    # One host may have a stored ceiling and another none: then all measure, or they would wait for each other.
    if round(total(0.0 if known is None else 1.0)) == world:
        assert known is not None
        share = total(known.flops_per_s / processes)
        return known.model_copy(update={"flops_per_s": share, "key": _of_world(key, world)})
    shapes = _SHAPES[device.type]
    rates = []
    for variant in range(len(shapes)):
        work = _make(dtype, variant, device)
        work.run()
        barrier()
        rates.append(total(room * fastest_rate(repeat(work, seconds / len(shapes), device))))
    best = max(range(len(rates)), key=rates.__getitem__)
    measurement = Measurement(
        key=_of_world(key, world), flops_per_s=rates[best], shape=shapes[best], seconds=seconds / len(shapes)
    )
    if store and world == processes:
        store_measurement(measurement)
    return measurement


def _room(processes: int, threads: int, cores: int, device: str) -> float:
    """The share of its fastest rate that each process can have while all work: on fewer cores than threads they take
    turns."""
    return 1.0 if device == "cuda" else min(1.0, cores / (processes * threads))


def _of_world(key: MeasurementKey, world: int) -> MeasurementKey:
    return key.model_copy(update={"processes": world})


def run_cli(
    dtype: list[DType],
    processes: list[int],
    seconds: float = 1.0,
    device: str = "cpu",
    threads: int | None = None,
    as_json: bool = False,
) -> None:
    """``trainsys bench matmul``: measure every dtype at every process count, store, and print."""
    results = [measure_matmul(d, p, seconds, device, threads) for d in dtype for p in processes]
    if as_json:
        print(json.dumps([r.model_dump(mode="json") for r in results], indent=1))
        return
    table = Table(title=f"Matmul ceiling of {results[0].key.device}, {results[0].key.cores} cores")
    for column in ("dtype", "processes", "threads each", "GFLOP/s together", "each", "best (m, n, k)"):
        table.add_column(column, justify="right")
    for r in results:
        rate = r.flops_per_s / 1e9
        table.add_row(
            r.key.dtype,
            str(r.key.processes),
            str(r.key.threads),
            f"{rate:,.1f}",
            f"{rate / r.key.processes:,.1f}",
            "x".join(map(str, r.shape)),
        )
    Console().print(table)
