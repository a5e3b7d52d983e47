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

Without a profiler capture, phase timers cannot tell matmuls from other kernels: then all of forward and
backward above the useful time stands under ``compute_below_peak``, which says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from trainsys.profiler.peak import Reached, at_peak, compute_of, make_room
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
JITTER = "jitter (waiting)"
"""The label of ``straggler`` where nobody was found to be one."""
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
    """One line of the ledger; seconds per step, mean over ranks and steps."""

    name: str
    label: str
    seconds: float
    share: float
    """Share of the wall time per step, 0..1."""
    mfu_without: float | None
    """MFU had this term been nothing; None for what is outside steps, which MFU does not count."""
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
    """``useful`` / ``step_s``, 0..1: stalls between steps are goodput's. The run's one MFU: whoever quotes it takes it
    from here."""
    peak_flops: float | None
    """FLOP/s of one rank that ``mfu`` is a share of."""
    peak_before: float | None
    """What was taken for the peak at the run's start; lower where its steps exceeded it."""
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


def seconds_by_term(table: StepTable, work: Work, capture: Capture | None = None) -> dict[str, Floats]:
    """term -> seconds [T, R]. At each step and rank they sum to step time plus stalls. Which part of ``compute`` is
    useful work depends on a peak: ``at_peak`` tells."""
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
    for name, values in _split_compute(left, table, work, capture).items():
        add(name, values)
    for name in _COMPUTE:
        left.pop(name, None)
    for values in left.values():
        add("unattributed", values)
    for kind, values in table.stalls.items():
        add(_stall(kind), values)
    return out


def _stall(kind: str) -> str:
    """The term of a kind of stall."""
    return STALL + (kind if kind != "all" else "pauses")


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
    left: dict[str, Floats], table: StepTable, work: Work, capture: Capture | None
) -> dict[str, Floats]:
    zero = np.zeros(table.time.shape)
    forward, backward = left.get("forward", zero), left.get("backward", zero)
    out: dict[str, Floats] = {}
    if "recompute" in left:  # timed by itself
        out["recompute"] = left["recompute"]
    elif work.recompute_share > 0:
        out["recompute"] = np.minimum(forward * work.recompute_share, backward)
        backward = backward - out["recompute"]
    compute = forward + backward
    padded = work.padding_flops[:, None]
    if np.any(padded > 0):
        known = table.flops_model[:, None] > 0
        share = np.divide(padded, table.flops_model[:, None] + padded, out=np.zeros_like(padded), where=known)
        out["padding"] = compute * share
        compute = compute - out["padding"]
    if capture is None:
        return {**out, "compute": compute}
    out["launch"] = compute * capture.idle
    compute = compute - out["launch"]
    matmul = compute * min(1.0, capture.matmul / max(1e-9, 1.0 - capture.idle))
    return {**out, "compute": matmul, "other_compute": compute - matmul}


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

    ``peak_flops``: FLOP/s of one rank at the run's dtype; None: unknown, then the ledger has no MFU. ``measured``: it is
    no catalogue's. A peak that the steps exceed is raised to what they reached (``profiler.peak``).
    """

    def __init__(self, peak_flops: float | None, measured: bool = False) -> None:
        self._peak, self._reached = peak_flops, Reached(measured)
        self._table: StepTable | None = None
        self._steps = 0
        self._sums: dict[str, Floats] = {}
        self._between: dict[str, float] = {}
        """Seconds of each term outside steps, over all ranks."""
        self._flops_known = True
        self._flops = self._step_s = 0.0

    def add(self, table: StepTable, work: Work) -> dict[str, Floats]:
        """Returns the window's ``seconds_by_term``."""
        parts = seconds_by_term(table, work, mean_capture(table.captures))
        rows = np.flatnonzero(table.work)
        if rows.size:
            self._table = table
            self._steps += rows.size
            for name, values in parts.items():
                self._sums[name] = self._sums.get(name, 0.0) + values[rows].sum(axis=0)
            self._step_s += float(table.time[rows].sum())
            for kind, values in table.stalls.items():
                name = _stall(kind)
                self._between[name] = self._between.get(name, 0.0) + float(values[rows].sum())
            known = bool((table.flops_model > 0).all()) if table.of_run is None else table.of_run.flops_known
            self._flops_known &= known
            self._flops += float(table.flops_model[rows].sum()) / table.layout.world
            self._reached.add(table, rows, compute_of(parts))
        return parts

    def peak(self) -> float | None:
        """FLOP/s of one rank that MFU is a share of; None where it cannot be told."""
        return self._reached.settle(self._peak) if self._peak and self._flops_known and self._steps else None

    def waterfall(self) -> Waterfall | None:
        """The mean step; None where there is no such step."""
        table = self._table
        if table is None:
            return None
        capture = mean_capture(table.captures)
        parts = {name: total / self._steps for name, total in self._sums.items()}  # [R]
        cells = self._steps * len(table.ranks)
        step_s = self._step_s / cells
        between = {name: seconds / cells for name, seconds in self._between.items()}
        wall_s = step_s + sum(between.values())
        peak, useful, notes = self.peak(), None, _notes(table, self._peak, capture, parts)
        if peak is not None:
            useful = self._flops / self._steps / peak
            moved = make_room(parts, between, useful)
            if moved > 1e-3 * step_s:
                notes.append(
                    f"{1e3 * moved:,.2f} ms of useful work ran while phases other than forward and backward were timed, "
                    "and are taken from all of them alike"
                )
            compute = compute_of(parts)
            parts = at_peak(parts, useful * compute / max(float(np.mean(compute)), 1e-12))
        terms = []
        for name in sorted(parts, key=_place):
            by_rank = parts[name]
            seconds = float(by_rank.mean())
            if abs(seconds) < 1e-9 and name not in ("useful", "unattributed"):
                continue
            slowest = int(by_rank.argmax())
            inside = seconds - between.get(name, 0.0)
            without = None
            if useful is not None and name != "useful" and inside > 1e-9 and step_s > inside:
                without = useful / (step_s - inside)
            terms.append(
                Term(name, label(name), seconds, seconds / wall_s if wall_s else 0.0, without,
                     _is_estimate(name, table, capture), table.ranks[slowest], float(by_rank[slowest]))
            )  # fmt: skip
        return Waterfall(
            terms, wall_s, step_s, self._steps, None if useful is None or not step_s else useful / step_s, peak,
            self._peak, "device" if table.on_device else "host", notes,
        )  # fmt: skip


def waterfall(table: StepTable, peak_flops: float | None, work: Work, measured: bool = False) -> Waterfall | None:
    """That of one table."""
    ledger = Ledger(peak_flops, measured)
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
    if "recompute" in parts and "recompute" not in table.phases:
        notes.append("recomputation is forward's time x the share of forward FLOPs that the policy repeats")
    if any(axis not in ("pp", "unknown") and not table.groups(axis) for axis in axes_of(table)):
        notes.append("some axes have no known groups: their waiting for late peers is counted as communication")
    return notes
