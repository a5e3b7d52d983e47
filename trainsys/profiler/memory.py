"""Memory by part: what the planner's model predicts beside what the run measured, and the parts sum to the peak.

An allocator tells two totals that a prediction can be held against. What is allocated when a step has ended is
resident: parameters, gradients, optimizer state. What the peak adds is transient: activations, logits, buffers,
gathered parameters. What is reserved beyond the peak is fragmentation: the allocator holds it in pieces between what is
in use. A run that died for want of memory is told whether it would have fitted without. On CPU there is the resident
set alone, of which interpreter and libraries are a part that no formula gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.hardware import lookup
from trainsys.planner.machine import from_device
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import MemoryConstants, shipped_memory
from trainsys.planner.one import case_of
from trainsys.planner.settings import AXES
from trainsys.profiler.steps import Floats, StepTable
from trainsys.telemetry.events import RunStart
from trainsys.telemetry.text import size

RESIDENT = ("parameters", "gradients", "optimizer")
TRANSIENT = ("activations", "logits", "buffers")
# The arithmetic needs the shape of no particular device; this one's name is only a key of the catalogue.
_ANY_DEVICE = "H100-SXM-80"


@dataclass(frozen=True)
class MemoryPart:
    """Bytes on the rank with the highest memory use. ``measured`` None: no counter tells this part alone."""

    name: str
    predicted: float | None
    measured: float | None


@dataclass(frozen=True)
class MemoryReport:
    """``parts`` sum to ``peak``: ``shown(part)`` is measured where that is known, else predicted, and the last part,
    ``other``, is what is left."""

    rank: int
    peak: float
    predicted_total: float | None
    capacity: float | None
    parts: list[tuple[str, float]]
    compared: list[MemoryPart]
    reserved: float
    fragmentation: float
    """Bytes reserved beyond the highest use; 0 where no allocator tells."""
    would_have_fitted: str
    """For a run that ran out of memory: whether fragmentation was to blame; empty for others."""
    leak_bytes_per_step: float
    """Slope of memory at the ends of steps, 0 unless it grows beyond doubt."""
    by_stage: dict[int, float]
    """Highest peak of each pipeline stage."""
    over_time: list[tuple[int, float, float]]
    """(step, resident bytes, peak bytes) of the rank with the highest memory use, thinned."""
    notes: list[str] = field(default_factory=list)


def predict(cfg: RunConfig, start: RunStart) -> dict[str, float] | None:
    """Bytes by part on the rank with the highest use (``planner.memory``); None where the planner does not know such a
    run."""
    # As the run resolved it, which may have been on other devices than the config asks for.
    axes = {axis: start.layout[axis] for axis in AXES if axis in start.layout}
    here = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=axes)})
    try:
        cases = case_of(here, start.world, from_device(lookup(start.hardware or _ANY_DEVICE)))
    except UserError:
        return None
    found = peak_memory(cases, _constants(start))
    parts = {name: float(np.max(getattr(found, name))) for name in (*RESIDENT, *TRANSIENT)}
    if start.dtype == "fp32":
        parts["activations"] *= 2.0  # the model counts 16-bit activations
    return parts


def _constants(start: RunStart) -> MemoryConstants:
    constants = shipped_memory()
    # The context and libraries of a GPU; on CPU the interpreter stands under "other".
    return constants if start.device_memory else replace(constants, overhead_bytes=0.0)


@dataclass(frozen=True)
class MemoryUse:
    """What a run told of its memory: each rank's highest peak, and all of the one with the highest; bytes."""

    ranks: Sequence[int]
    stages: npt.NDArray[np.int64]
    """[R]: pipeline stage."""
    peaks: Floats
    """[R]"""
    steps: npt.NDArray[np.int64]
    """[T]"""
    fullest: dict[str, Floats]
    """allocated, reserved, peak, rss of the rank with the highest peak [T]."""

    @classmethod
    def of(cls, table: StepTable) -> MemoryUse:
        peaks = table.memory["peak"].max(axis=0)
        fullest = {name: values[:, int(peaks.argmax())] for name, values in table.memory.items()}
        return cls(table.ranks, table.peers(), peaks, table.steps, fullest)


def memory_report(
    use: MemoryUse, start: RunStart, cfg: RunConfig | None, reason: str = ""
) -> MemoryReport | None:
    """None for a run that told no memory. ``reason``: what ended the run, as its last record says."""
    if not use.peaks.any():
        return None
    column = int(use.peaks.argmax())
    high = float(use.peaks[column])
    allocated, reserved, peak = (use.fullest[name] for name in ("allocated", "reserved", "peak"))
    on_device = bool(allocated.any())
    resident = float(np.median(allocated[allocated > 0])) if on_device else None
    guess = predict(cfg, start) if cfg is not None else None
    notes: list[str] = []
    if guess is None:
        notes.append("no prediction: the run's config is missing or the planner does not model it")
    compared: list[MemoryPart] = []
    parts: list[tuple[str, float]] = []
    if guess is not None:
        parts = _fill(guess, high, resident)
        compared = [MemoryPart(name, guess[name], None) for name in (*RESIDENT, *TRANSIENT)]
        if resident is not None:
            compared.append(MemoryPart("resident between steps", sum(guess[n] for n in RESIDENT), resident))
            compared.append(MemoryPart("transient at the peak", sum(guess[n] for n in TRANSIENT), high - resident))
    elif resident is not None:
        parts = [("resident between steps", resident), ("transient at the peak", high - resident)]
    parts.append(("other", high - sum(v for _, v in parts)))
    if not on_device:
        notes.append("on CPU the peak is of the process's resident set: interpreter and libraries are under other")
    held = allocated if on_device else use.fullest["rss"]
    thin = np.unique(np.linspace(0, len(use.steps) - 1, min(300, len(use.steps))).astype(int))
    return MemoryReport(
        use.ranks[column], high, None if guess is None else sum(guess.values()),
        float(start.device_memory) if start.device_memory else None, parts, compared,
        float(reserved.max()), max(0.0, float(reserved.max()) - high) if on_device else 0.0, would_have_fitted(reason),
        _leak(held), {int(s): float(use.peaks[use.stages == s].max()) for s in np.unique(use.stages)},
        [(int(use.steps[i]), float(held[i]), float(peak[i])) for i in thin], notes,
    )  # fmt: skip


def _fill(guess: dict[str, float], high: float, resident: float | None) -> list[tuple[str, float]]:
    """Predicted parts, scaled down where they would exceed what was measured: never more than the peak."""
    out: list[tuple[str, float]] = []
    for names, room in ((RESIDENT, resident), (TRANSIENT, None if resident is None else high - resident)):
        total = sum(guess[n] for n in names)
        limit = room if room is not None else max(0.0, high - sum(v for _, v in out))
        scale = min(1.0, limit / total) if total > 0 else 1.0
        out += [(n, guess[n] * scale) for n in names]
    return out


_OOM = {
    "asked": r"Tried to allocate ([\d.]+) (\w+)",
    "free": r"of which ([\d.]+) (\w+) is free",
    "pieces": r"([\d.]+) (\w+) is reserved by PyTorch but unallocated",
}
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def would_have_fitted(reason: str) -> str:
    """What torch's own words about an allocation that failed add up to; empty for any other reason.

    An allocation fails although there is room when the room is in pieces: what is reserved and not allocated.
    """
    found = {name: re.search(pattern, reason) for name, pattern in _OOM.items()}
    if "out of memory" not in reason or found["asked"] is None:
        return ""
    asked, free, pieces = (
        float(m[1]) * _UNITS.get(m[2], 1) if (m := found[name]) else 0.0 for name in ("asked", "free", "pieces")
    )
    if pieces and asked <= free + pieces:
        return (
            f"it would have fitted without fragmentation: {size(asked)} were asked for, {size(free)} were free and "
            f"{size(pieces)} reserved in pieces; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    return f"it would not have fitted without fragmentation either: {size(asked - free - pieces)} were missing"


def _leak(held: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Bytes per step: the slope between the thirds of the run, if the last third is above all of the first."""
    x = held[len(held) // 5 :]  # caches and workspaces fill at first
    third = len(x) // 3
    if third < 10:
        return 0.0
    first, middle, last = x[:third], x[third : 2 * third], x[2 * third :]
    grows = np.quantile(last, 0.1) > np.quantile(first, 0.9) and np.median(middle) > np.median(first)
    slope = float(np.median(last) - np.median(first)) / (2 * third)
    return slope if grows and slope * len(x) > 0.02 * float(np.median(first)) else 0.0
