"""Matmuls by shape: FLOP/s reached, against what the device can do. Peaks from the catalogue only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from trainsys.profiler.trace.classify import COMM
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.intervals import Ints
from trainsys.profiler.trace.link import Launches, enclosing
from trainsys.profiler.trace.opflops import ELEMENT_BYTES, MATMUL, flops, moved_bytes

if TYPE_CHECKING:
    from trainsys.hardware import Device
    from trainsys.hardware.catalogue import DType

_DTYPES: dict[str, DType] = {
    "c10::BFloat16": "bf16",
    "BFloat16": "bf16",
    "c10::Half": "fp16",
    "Half": "fp16",
    "float": "tf32",
    "Float": "tf32",
    "c10::Float8_e4m3fn": "fp8",
    "Float8_e4m3fn": "fp8",
    "c10::Float8_e5m2": "fp8",
}
KEEP_SHAPES = 60


@dataclass(frozen=True, slots=True)
class ProductRow:
    """All calls of one operator at one shape.

    ``intensity``: FLOPs per byte that must move (0 where unknown). ``reachable``: the roofline's ceiling
    at that intensity, FLOP/s, and ``bound`` which side of it; None without a catalogued device.
    """

    op: str
    dims: str
    dtype: str
    calls: int
    flops: int
    time_ns: int
    intensity: float
    reachable: float | None
    bound: str | None

    @property
    def rate(self) -> float:
        """FLOP/s reached."""
        return self.flops / self.time_ns * 1e9 if self.time_ns else 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of a trace from recorded shapes. ``products``: matmuls; ``attention``: not causal-halved."""

    products: int = 0
    attention: int = 0
    unlinked_calls: int = 0
    """Calls whose kernels were not found: their FLOPs count, their time does not."""


def peak_of(device: Device | None, dtype: str) -> float | None:
    """Dense peak for a torch dtype, FLOP/s. ``float`` is TF32's where the device has it, else FP32's."""
    if device is None or dtype not in _DTYPES:
        return None
    return device.peak(_DTYPES[dtype]) or (device.peak("fp32") if _DTYPES[dtype] == "tf32" else None)


def products(trace: RankTrace, kinds: Ints, launches: Launches) -> tuple[list[ProductRow], Work]:
    """Group the counted operators by shape, with the time of the kernels they launched. Longest first.

    ``reachable`` and ``bound`` are left to :func:`with_roofline`, which needs the catalogue of devices.
    """
    ops, activity = trace.ops, trace.device
    if not len(ops):
        return [], Work()
    length = np.where(kinds < COMM, activity.end - activity.start, 0)
    owner = enclosing(ops, launches.start, launches.thread)
    owned = owner >= 0
    time = (
        np.bincount(owner[owned], length[owned], len(ops)).astype(np.int64)
        if owned.any()
        else np.zeros(len(ops))
    )
    groups: dict[tuple[str, object, str], list[int]] = {}
    for i, shape in enumerate(ops.correlation.tolist()):
        op = trace.op_shapes[shape]
        groups.setdefault((op.name, op.dims, op.dtype), []).append(i)
    rows: list[ProductRow] = []
    totals = {True: 0, False: 0}
    unlinked = 0
    for (name, dims, dtype), members in groups.items():
        once = flops(name, dims)  # type: ignore[arg-type]
        totals[name in MATMUL] += once * len(members)
        ns = int(time[members].sum())
        unlinked += int((time[members] == 0).sum())
        if not once or not ns:
            continue
        moved = moved_bytes(name, dims, ELEMENT_BYTES.get(dtype, 0))  # type: ignore[arg-type]
        intensity = once / moved if moved else 0.0
        text = " x ".join(str(list(d)) for d in dims if d)  # type: ignore[attr-defined]
        rows.append(
            ProductRow(
                name, text, dtype, len(members), once * len(members), ns, round(intensity, 2), None, None
            )
        )
    rows.sort(key=lambda r: (-r.time_ns, r.op, r.dims))
    return rows[:KEEP_SHAPES], Work(totals[True], totals[False], unlinked)


def with_roofline(rows: list[ProductRow], device: Device) -> list[ProductRow]:
    """The rows with what the device allows at each one's intensity; a dtype without a known peak is left as it is."""
    out = []
    for row in rows:
        peak = peak_of(device, row.dtype)
        if peak is not None:
            by_memory = row.intensity * device.memory.bandwidth_gb_s * 1e9 if row.intensity else peak
            row = replace(
                row, reachable=min(by_memory, peak), bound="memory" if by_memory < peak else "compute"
            )
        out.append(row)
    return out
