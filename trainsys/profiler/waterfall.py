"""The MFU ledger: from the peak down to what was reached, term by term, and the terms sum to the wall time.

    useful at the peak         model FLOPs / (world x peak): the time that nothing could shorten
    padding                    forward and backward of tokens that are padding
    recompute                  forwards that backward repeats
    matmul below peak          matmuls slower than the peak
    other compute              the rest of forward and backward; the optimizer
    exposed communication      by axis, less waiting for late peers
    pipeline bubble            waiting for other stages
    launch gaps                the device has nothing to do because the host is behind
    data                       waiting for the next batch, copying it to the device
    stragglers                 waiting for late peers; and what a rank that is late for good is late by
    garbage, checkpoint, …     pauses, within steps or between them
    not attributed             what no phase claims

Every rank's seconds are moved between terms and never made or lost, so each rank's terms sum to its own step
time, and the mean over ranks to the mean step time.

Without a profiler capture, phase timers cannot tell products from other kernels: then all of forward and
backward above the useful time stands under ``compute_below_peak``, which says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.steps import Capture, Floats, StepTable, axes_of
from trainsys.profiler.waits import garbage_share, late_excess, waiting, work_phases
from trainsys.telemetry.events import COMM

LABELS = {
    "useful": "useful work at the peak",
    "compute": "compute",
    "padding": "padding",
    "recompute": "recomputation",
    "matmul_below_peak": "matmuls below the peak",
    "other_compute": "other compute in forward and backward",
    "compute_below_peak": "compute below the peak",
    "optimizer": "optimizer",
    "bubble": "pipeline bubble",
    "launch": "launch gaps, host behind",
    "data": "data",
    "straggler": "waiting for stragglers",
    "gc": "garbage collection",
    "unattributed": "not attributed",
}
_COMPUTE = ("forward", "backward", "recompute")
_DATA = ("data", "h2d")
_PAUSES = ("checkpoint", "eval", "compile", "report", "data_retry")
"""Phases that would be stalls, had they been outside the step."""
STALL = "stall/"


def label(term: str) -> str:
    """A term in words."""
    if term.startswith(COMM):
        return f"communication {term[len(COMM) :]}"
    if term.startswith(STALL):
        return f"stall: {term[len(STALL) :].replace('_', ' ')}"
    return LABELS.get(term, term)


@dataclass(frozen=True)
class Term:
    """One line of the ledger; seconds a step, mean over ranks and steps."""

    name: str
    label: str
    seconds: float
    share: float
    """Of a step's wall time; with a known peak also the MFU points that it takes, as 0..1."""
    mfu_without: float | None
    """MFU had this term been nothing."""
    estimated: bool
    """Split by a formula or by a capture of another step, not timed in each step."""
    slowest_rank: int
    slowest_s: float


@dataclass(frozen=True)
class Waterfall:
    """``wall_s`` = ``step_s`` + stalls, and what ``terms`` sum to."""

    terms: list[Term]
    wall_s: float
    step_s: float
    steps: int
    mfu: float | None
    """Of the wall time, stalls included; the step's own is ``mfu_step``."""
    mfu_step: float | None
    clock: str
    notes: list[str] = field(default_factory=list)

    def get(self, name: str) -> float:
        """Seconds of a term, 0 where it has none."""
        return sum(t.seconds for t in self.terms if t.name == name)


@dataclass(frozen=True)
class Work:
    """What the config tells about FLOPs that the events do not: [T], over all ranks."""

    padding_flops: Floats
    recompute_flops: Floats
    recompute_share: float
    """Forward FLOPs that backward repeats, as a share of forward's."""


def seconds_by_term(
    table: StepTable, peak_flops: float | None, work: Work, capture: Capture | None = None
) -> dict[str, Floats]:
    """term -> seconds [T, R]. At each step and rank they sum to step time plus stalls."""
    left = {name: values.copy() for name, values in table.phases.items()}
    zero = np.zeros(table.time.shape)
    out: dict[str, Floats] = {}

    def add(name: str, values: Floats) -> None:
        out[name] = out[name] + values if name in out else values

    waits = waiting(table)
    by_garbage = garbage_share(table)[:, None]
    for axis, wait in waits.items():
        add("gc", wait * by_garbage)
        add("straggler", wait * (1.0 - by_garbage))
        rest = left.pop(COMM + axis) - wait
        add("bubble" if axis == "pp" else COMM + axis, rest)
    excess = late_excess(table)
    names = work_phases(table)
    above = _excess_by_phase(table, names)
    total = sum(above.values(), start=zero)
    for name in names:
        part = np.divide(excess * above[name], total, out=np.zeros_like(excess), where=total > 0)
        part = np.minimum(part, left[name])
        left[name] -= part
        add("straggler", part)
    add("gc", left.pop("gc", zero.copy()))
    for name in _DATA:
        add("data", left.pop(name, zero.copy()))
    add("optimizer", left.pop("optimizer", zero.copy()))
    for name in _PAUSES:
        if name in left:
            add(STALL + name, left.pop(name))
    for name, values in _split_compute(left, table, peak_flops, work, capture).items():
        add(name, values)
    for name in _COMPUTE:
        left.pop(name, None)
    for values in left.values():
        add("unattributed", values)
    for kind, values in table.stalls.items():
        add(STALL + kind if kind != "all" else STALL + "pauses", values)
    return out


def _excess_by_phase(table: StepTable, names: Iterable[str]) -> dict[str, Floats]:
    """By how much each phase of each rank is above the peers' median, the place from which lateness is taken."""
    peers = table.peers()
    out = {}
    for name in names:
        values = table.phases[name]
        middle = np.zeros_like(values)
        for stage in np.unique(peers):
            mine = peers == stage
            middle[:, mine] = np.median(values[:, mine], axis=1, keepdims=True)
            if mine.sum() == 2:
                middle[:, mine] = values[:, mine].min(axis=1, keepdims=True)
        out[name] = np.maximum(0.0, values - middle)
    return out


def _split_compute(
    left: dict[str, Floats], table: StepTable, peak: float | None, work: Work, capture: Capture | None
) -> dict[str, Floats]:
    zero = np.zeros(table.time.shape)
    forward, backward = left.get("forward", zero), left.get("backward", zero)
    out: dict[str, Floats] = {}
    if "recompute" in left:  # timed by itself
        out["recompute"] = left["recompute"]
    elif work.recompute_share > 0:
        out["recompute"] = np.minimum(forward * work.recompute_share, backward)
        backward = backward - out["recompute"]
    useful = forward + backward
    known = table.flops_model[:, None] > 0
    padded = work.padding_flops[:, None]
    if np.any(padded > 0):
        share = np.divide(padded, table.flops_model[:, None] + padded, out=np.zeros_like(padded), where=known)
        out["padding"] = useful * share
        useful = useful - out["padding"]
    if capture is not None:
        out["launch"] = useful * capture.idle
        useful = useful - out["launch"]
    all_known = known.all() if table.of_run is None else table.of_run.flops_known
    if not peak or not all_known:
        if capture is None:
            return {**out, "compute": useful}
        busy = max(1e-9, 1.0 - capture.idle)
        matmul = useful * min(1.0, capture.matmul / busy)
        return {**out, "compute": matmul, "other_compute": useful - matmul}
    world = table.layout.world
    at_peak = table.flops_model[:, None] / (peak * world)
    # The mean over ranks is what counts: a stage with fewer layers has less useful work than its share says.
    scale = np.minimum(1.0, np.divide(useful.mean(axis=1, keepdims=True), at_peak, out=np.ones_like(at_peak),
                                      where=at_peak > 0))  # fmt: skip
    mean = useful.mean(axis=1, keepdims=True)
    ideal = at_peak * scale * np.divide(useful, mean, out=np.ones_like(useful), where=mean > 0)
    out["useful"] = ideal
    if capture is None:
        return {**out, "compute_below_peak": useful - ideal}
    busy = max(1e-9, 1.0 - capture.idle)
    products = np.maximum(ideal, useful * min(1.0, capture.matmul / busy))
    return {**out, "matmul_below_peak": products - ideal, "other_compute": useful - products}


def mean_capture(captures: Iterable[Capture]) -> Capture | None:
    """The mean of all captures, or None without one."""
    found = list(captures)
    if not found:
        return None
    return Capture(
        found[-1].step,
        -1,
        sum(c.matmul for c in found) / len(found),
        sum(c.idle for c in found) / len(found),
    )


class Ledger:
    """The waterfall of any number of windows: sums over their steps of ``table.work``.

    ``peak_flops``: FLOP/s of one rank at the run's dtype; None: unknown, then the ledger has no MFU.
    """

    def __init__(self, peak_flops: float | None) -> None:
        self._peak = peak_flops
        self._table: StepTable | None = None
        self._steps = 0
        self._sums: dict[str, Floats] = {}
        self._step_s = self._stalls_s = 0.0

    def add(self, table: StepTable, work: Work) -> dict[str, Floats]:
        """Returns the window's ``seconds_by_term``."""
        parts = seconds_by_term(table, self._peak, work, mean_capture(table.captures))
        rows = np.flatnonzero(table.work)
        if rows.size:
            self._table = table
            self._steps += rows.size
            for name, values in parts.items():
                self._sums[name] = self._sums.get(name, 0.0) + values[rows].sum(axis=0)
            self._step_s += float(table.time[rows].sum())
            self._stalls_s += sum(float(values[rows].sum()) for values in table.stalls.values())
        return parts

    def waterfall(self) -> Waterfall | None:
        """The mean step; None where there is no such step."""
        table = self._table
        if table is None:
            return None
        capture = mean_capture(table.captures)
        parts = {name: total / self._steps for name, total in self._sums.items()}  # [R]
        cells = self._steps * len(table.ranks)
        step_s = self._step_s / cells
        wall_s = step_s + self._stalls_s / cells
        useful = float(parts["useful"].mean()) if "useful" in parts else None
        terms = []
        for name in sorted(parts, key=_place):
            by_rank = parts[name]
            seconds = float(by_rank.mean())
            if abs(seconds) < 1e-9 and name not in ("useful", "unattributed"):
                continue
            slowest = int(by_rank.argmax())
            without = None
            if useful is not None and name != "useful" and wall_s > seconds:
                without = useful / (wall_s - seconds)
            terms.append(
                Term(name, label(name), seconds, seconds / wall_s if wall_s else 0.0, without,
                     _is_estimate(name, table, capture), table.ranks[slowest], float(by_rank[slowest]))
            )  # fmt: skip
        return Waterfall(
            terms, wall_s, step_s, self._steps,
            None if useful is None or not wall_s else useful / wall_s,
            None if useful is None or not step_s else useful / step_s,
            "device" if table.on_device else "host", _notes(table, self._peak, capture, parts),
        )  # fmt: skip


def waterfall(table: StepTable, peak_flops: float | None, work: Work) -> Waterfall | None:
    """That of one table."""
    ledger = Ledger(peak_flops)
    ledger.add(table, work)
    return ledger.waterfall()


def _place(name: str) -> tuple[float, str]:
    order = list(LABELS)
    if name.startswith(COMM):
        return order.index("optimizer") + 0.5, name
    if name.startswith(STALL):
        return order.index("gc") + 0.5, name
    return float(order.index(name)), name


def _is_estimate(name: str, table: StepTable, capture: Capture | None) -> bool:
    if name == "recompute":
        return "recompute" not in table.phases
    return name in ("padding", "matmul_below_peak", "other_compute", "launch") or (
        name == "compute" and capture is not None
    )


def _notes(
    table: StepTable, peak: float | None, capture: Capture | None, parts: dict[str, Floats]
) -> list[str]:
    notes = []
    if peak is None:
        notes.append("no peak is known for this hardware, so there is no MFU: trainsys bench matmul measures one")
    if capture is None:
        notes.append(
            "no profiler capture in this run: matmuls and other compute are not told apart "
            "(telemetry.capture_every=N takes one every N steps)"
        )
    else:
        notes.append(
            f"matmuls, other compute and launch gaps are split as in the profiler capture of step {capture.step}"
        )
    below = parts.get("compute_below_peak", parts.get("matmul_below_peak"))
    if below is not None and below.mean() < 1e-9:
        notes.append("the steps are as fast as the peak allows or faster: the peak was measured too low")
    if "recompute" in parts and "recompute" not in table.phases:
        notes.append("recomputation is forward's time x the share of forward FLOPs that the policy repeats")
    if any(axis not in ("pp", "unknown") and not table.groups(axis) for axis in axes_of(table)):
        notes.append("some axes have no known groups: their waiting for late peers is counted as communication")
    return notes
