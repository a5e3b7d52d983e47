"""Predict and rank every layout of a job; Pareto front; what would work where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from trainsys.errors import UserError
from trainsys.flops import train_flops_per_token
from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import Constants, shipped
from trainsys.planner.memory import GIB, Memory, peak_memory
from trainsys.planner.memory_constants import MemoryConstants, shipped_memory
from trainsys.planner.settings import named
from trainsys.planner.space import Job, Limit, divisors, enumerate_layouts, to_cases
from trainsys.planner.step_time import StepTime, step_time

CHUNK = 4096  # layouts predicted at once: their arrays stay in cache
MOST_DEVICES = 65_536  # that a plan which does not fit is told would do


@dataclass(frozen=True)
class Found:
    """Predictions of every layout that fits, fastest first. Seconds and bytes."""

    job: Job
    layouts: dict[str, Array]
    time: StepTime
    memory: Memory
    considered: int
    over_memory: int
    margin: float

    @property
    def count(self) -> int:
        return len(self.time.total)

    @property
    def mfu(self) -> Array:
        """Model FLOPs (exact convention: causal, no recomputation) over the dense 16-bit catalogue peak."""
        flops = train_flops_per_token(self.job.model, self.job.seq_len, "exact")
        tokens = self.job.global_batch * self.job.seq_len
        out: Array = flops * tokens / (self.time.total * self.job.world * self.job.machine.peak_16)
        return out

    def layout(self, i: int) -> dict[str, int | str]:
        """Names and values of layout ``i``."""
        return named(self.layouts, i)

    def distinct(self, most: int) -> list[int]:
        """The best layout of each (pp, cp, tp, ep, micro-batch), fastest first: close cousins are left out."""
        seen: set[tuple[float, ...]] = set()
        out = []
        for i in range(self.count):
            key = tuple(float(self.layouts[k][i]) for k in ("pp", "cp", "tp", "ep", "micro_batch"))
            if key not in seen:
                seen.add(key)
                out.append(i)
                if len(out) == most:
                    break
        return out

    def pareto(self) -> list[int]:
        """Layouts that no other beats in both time and memory, fastest first."""
        front, least = [], np.inf
        for i in range(self.count):
            if self.memory.total[i] < least * 0.995:
                front.append(i)
                least = float(self.memory.total[i])
        return front


Index = NDArray[np.signedinteger]


def _join(parts: Sequence[StepTime | Memory], cls: type, order: Index) -> dict[str, Array]:
    names = [f.name for f in fields(cls)]
    return {n: np.concatenate([np.atleast_1d(getattr(p, n)) for p in parts])[order] for n in names}


def _row(part: StepTime | Memory, keep: Index | slice) -> dict[str, Array]:
    """Fields broadcast to one length, then the rows to keep."""
    shape = part.total.shape
    return {f.name: np.broadcast_to(getattr(part, f.name), shape)[keep] for f in fields(part)}


def predict_all(c: Cases, k: Constants, m: MemoryConstants, room: float) -> tuple[Index, StepTime, Memory]:
    """(indices of layouts within ``room`` of usable memory, their times and memory), fastest first.

    Memory is cheap and goes first; time is predicted only for what fits.
    """
    kept, memories = [], []
    for start in range(0, c.size, CHUNK):
        part = c.take(slice(start, start + CHUNK))
        mem = peak_memory(part, m)
        fits = np.flatnonzero(mem.total <= room * m.usable * c.mem_bytes)
        kept.append(fits + start)
        memories.append(Memory(**_row(mem, fits)))
    index: Index = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    times = []
    for start in range(0, len(index), CHUNK):
        part = c.take(index[start : start + CHUNK])
        t = step_time(part, k)
        times.append(StepTime(**_row(t, slice(None))))
    if not len(index):
        empty = np.zeros(0)
        return index, StepTime(*[empty] * len(fields(StepTime))), Memory(*[empty] * len(fields(Memory)))
    total = np.concatenate([t.total for t in times])
    order = np.argsort(total, kind="stable")
    return index[order], StepTime(**_join(times, StepTime, order)), Memory(**_join(memories, Memory, order))


def search(
    job: Job,
    limits: Sequence[Limit] = (),
    margin: float = 0.05,
    k: Constants | None = None,
    m: MemoryConstants | None = None,
) -> Found:
    """Rank every layout that divides, obeys ``limits`` and leaves ``margin`` of the usable memory free.

    Raises:
        UserError: none does; says why and the nearest thing that would work.
    """
    k, m = k or shipped(), m or shipped_memory()
    layouts = enumerate_layouts(job, limits)
    n = len(layouts["pp"])
    if n == 0:
        raise UserError(_nothing_divides(job, limits))
    cases = to_cases(job, layouts)
    index, time, memory = predict_all(cases, k, m, 1.0 - margin)
    if not len(index):
        raise UserError(_nothing_fits(job, limits, cases, layouts, m, margin))
    chosen = {key: v[index] for key, v in layouts.items()}
    return Found(job, chosen, time, memory, n, n - len(index), margin)


def _nothing_divides(job: Job, limits: Sequence[Limit]) -> str:
    world, batch = job.world, job.global_batch
    if limits and len(enumerate_layouts(job)["pp"]):
        told = ", ".join(f"{lim.key}{lim.op}{lim.value:g}" for lim in limits)
        return f"no layout of {world} devices obeys {told}; without these limits there are some: drop one"
    sizes = sorted(range(max(world // 2, 1), world * 2 + 1), key=lambda w: abs(w - world))
    near = [w for w in sizes if batch % w == 0 or w % batch == 0]
    say = f"global_batch={batch} does not spread over {world} devices: no data-parallel size divides both"
    if near:
        return f"{say}; {near[0]} devices would work, or global_batch={max(batch // world, 1) * world}"
    return f"{say}; global_batch={max(batch // world, 1) * world} would work"


def _nothing_fits(
    job: Job,
    limits: Sequence[Limit],
    cases: Cases,
    layouts: dict[str, Array],
    m: MemoryConstants,
    margin: float,
) -> str:
    mem = peak_memory(cases, m)
    i = int(np.argmin(mem.total))
    least, room = float(mem.total[i]), (1.0 - margin) * m.usable * job.machine.mem_bytes
    shape = " ".join(
        f"{key}={int(layouts[key][i])}" for key in ("pp", "dp_shard", "cp", "tp") if layouts[key][i] > 1
    )
    say = (
        f"{job.model.name} fits on no layout of {job.world} x {job.machine.name}: the smallest "
        f"({shape or 'one device'}, full recomputation) needs {least / GIB:.1f} GiB of {room / GIB:.1f} usable"
    )
    if limits:
        try:
            free = search(job, (), margin, m=m)
        except UserError:
            free = None
        if free is not None:
            return f"{say}; without the limits {free.count} layouts fit"
    world = job.world
    while (world := 2 * world) <= MOST_DEVICES:
        bigger = replace(job, world=world, global_batch=max(job.global_batch, world))
        trial = enumerate_layouts(bigger)
        if len(trial["pp"]) and np.any(peak_memory(to_cases(bigger, trial), m).total <= room):
            extra = (
                "" if bigger.global_batch == job.global_batch else f" with global_batch={bigger.global_batch}"
            )
            return f"{say}; {bigger.world} devices{extra} would work"
    shorter = [s for s in divisors(job.seq_len) if 256 <= s < job.seq_len]
    for seq in reversed(shorter):
        trial_job = replace(job, seq_len=seq)
        trial = enumerate_layouts(trial_job)
        if len(trial["pp"]) and np.any(peak_memory(to_cases(trial_job, trial), m).total <= room):
            return f"{say}; seq_len={seq} would work"
    return f"{say}; devices with more memory are needed"
