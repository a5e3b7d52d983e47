"""Say in words why the winner wins, why a named layout lost, and what would change it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainsys.errors import UserError
from trainsys.planner.cases import Array
from trainsys.planner.constants import Constants
from trainsys.planner.memory import GIB, peak_memory
from trainsys.planner.memory_constants import MemoryConstants
from trainsys.planner.search import Found
from trainsys.planner.settings import NAMES, Columns, key_and_value
from trainsys.planner.space import enumerate_layouts, to_cases
from trainsys.planner.step_time import StepTime, step_time

PARTS = {
    "matmul": "matrix multiplication",
    "attention": "attention",
    "memory_bound": "memory-bound operations",
    "recompute": "recomputation",
    "tp_comm": "tensor-parallel communication",
    "cp_comm": "context-parallel communication",
    "ep_comm": "expert exchange",
    "fsdp_comm": "parameter gathering not hidden",
    "head": "embedding, head and loss",
    "bubble": "pipeline bubble",
    "pp_comm": "pipeline transfers",
    "dp_comm": "gradient reduction not hidden",
    "optimizer": "optimizer",
    "other": "host, imbalance and jitter",
}
# Useful work is no bottleneck to name; these are what a user can do something about.
_USEFUL = ("matmul", "attention", "head")


def bottleneck(time: StepTime, i: int) -> str:
    """The largest part that is not useful work, with its share of the step."""
    losses = {p: float(getattr(time, p)[i]) for p in PARTS if p not in _USEFUL}
    worst = max(losses, key=lambda p: losses[p])
    return f"{PARTS[worst]} {100.0 * losses[worst] / float(time.total[i]):.0f}%"


def differences(time: StepTime, a: int, other: StepTime, b: int, most: int = 3) -> str:
    """In what ``b`` is slower than ``a``, largest first, in percent of ``a``'s step."""
    total = float(time.total[a])
    deltas = {p: (float(getattr(other, p)[b]) - float(getattr(time, p)[a])) / total for p in PARTS}
    worse = sorted((p for p in deltas if deltas[p] > 0.003), key=lambda p: -deltas[p])[:most]
    better = sorted((p for p in deltas if deltas[p] < -0.003), key=lambda p: deltas[p])[:1]
    text = ", ".join(f"{PARTS[p]} +{100 * deltas[p]:.1f}%" for p in worse) or "nothing much"
    return text + (
        "; gains " + ", ".join(f"{PARTS[p]} {100 * deltas[p]:.1f}%" for p in better) if better else ""
    )


def why_first(found: Found) -> str:
    """The winner against the best layout that differs in its degrees."""
    axes = ("pp", "cp", "tp", "ep")
    first = tuple(found.layouts[a][0] for a in axes)
    for i in range(1, found.count):
        if tuple(found.layouts[a][i] for a in axes) != first:
            gap = 100.0 * (float(found.time.total[i] / found.time.total[0]) - 1.0)
            where = differences(found.time, 0, found.time, i)
            return f"next other degrees ({short(found, i)}) are {gap:.1f}% slower: {where}"
    return "no other degrees fit"


def short(found: Found, i: int) -> str:
    """One line for a layout: what is not 1, then the rest."""
    lay = found.layout(i)
    degrees = " ".join(
        f"{a}={lay[a]}" for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep") if lay[a] != 1
    )
    return f"{degrees or 'one device'} mb={lay['micro_batch']}" + (
        f" recompute={lay['recompute']}" if lay["recompute"] != "none" else ""
    )


def parse_favourite(text: str) -> dict[str, float]:
    """``tp=8,pp=4``. Raises UserError for anything else."""
    wanted: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = (x.strip() for x in item.partition("="))
        try:
            key, wanted_value = key_and_value(name, value)
        except UserError as error:
            raise UserError(f"--why {text!r}: {error}") from None
        wanted[key] = wanted_value
    return wanted


def why_not(found: Found, text: str, k: Constants, m: MemoryConstants) -> str:
    """Why the best layout matching ``text`` (``tp=8,pp=4``) did not win."""
    wanted = parse_favourite(text)
    layouts = enumerate_layouts(found.job)
    holds = {key: layouts[key] == value for key, value in wanted.items()}
    match = np.logical_and.reduce(list(holds.values()))
    if not match.any():
        return f"{text}: {_none_such(found, layouts, holds)}"
    index = np.flatnonzero(match)
    cases = to_cases(found.job, layouts).take(index)
    mem = peak_memory(cases, m)
    room = (1.0 - found.margin) * m.usable * found.job.machine.mem_bytes
    fits = mem.total <= room
    if not fits.any():
        return f"{text}: out of memory, needs at least {float(mem.total.min()) / GIB:.1f} GiB of {room / GIB:.1f} usable"
    time = step_time(cases, k)
    best = int(np.argmin(np.where(fits, time.total, np.inf)))
    gap = 100.0 * (float(time.total[best] / found.time.total[0]) - 1.0)
    whole = StepTime(
        *(np.broadcast_to(getattr(time, f), time.total.shape) for f in StepTime.__dataclass_fields__)
    )
    if gap < 1e-6:
        return f"{text}: is the first pick"
    return f"{text}: {gap:.1f}% slower than the first pick: {differences(found.time, 0, whole, best)}"


def _none_such(found: Found, layouts: Columns, holds: Mapping[str, NDArray[np.bool_]]) -> str:
    """Which of the wanted values, each of which ``holds`` of some layouts, no layout has beside the others."""
    for key in holds:
        rest = np.logical_and.reduce([np.ones(len(layouts[key]), bool), *(h for k, h in holds.items() if k != key)])
        if rest.any():
            there = sorted(set(layouts[key][rest].astype(int)))
            names = NAMES.get(key, ())
            values = ", ".join(names[v] if names else str(v) for v in there)
            others = " with the rest" if len(holds) > 1 else ""
            return (
                f"no such layout for {found.job.stack.engine} on {found.job.world} devices: {key} can be {values}{others}"
            )
    return f"no layout has any two of these for {found.job.stack.engine} on {found.job.world} devices"


def sensitivity(found: Found, k: Constants) -> list[tuple[str, float]]:
    """(change of machine, percent of tokens/s gained by the same layout)."""
    base = to_cases(found.job, {key: v[:1] for key, v in found.layouts.items()})
    t0 = float(step_time(base, k).total[0])
    changes: dict[str, dict[str, Array]] = {
        "twice the network": {"nic_bw": 2.0 * base.nic_bw},
        "half the network": {"nic_bw": 0.5 * base.nic_bw},
        "twice the scale-up link": {"link_bw": 2.0 * base.link_bw, "pair_bw": 2.0 * base.pair_bw},
        "twice the memory bandwidth": {"hbm_bw": 2.0 * base.hbm_bw},
        "10% faster matmuls": {"gemm_rate": 1.1 * base.gemm_rate, "gemm_rate_16": 1.1 * base.gemm_rate_16},
        "twice the global batch": {"global_batch": 2.0 * base.global_batch},
    }
    out = []
    for name, change in changes.items():
        t = float(step_time(base.replace(**dict(change)), k).total[0])
        work = 2.0 if name == "twice the global batch" else 1.0
        out.append((name, 100.0 * (work * t0 / t - 1.0)))
    return out
