"""A run's steps as arrays: step by rank, from the event files alone. What waterfall and blame are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainsys.layout import AXES, Axis, Layout
from trainsys.telemetry.events import COMM, COMM_AXES, DeviceStep, Flops, Metrics, RunStart, Stall, Step
from trainsys.telemetry.reader import Damage, event_file, iter_events
from trainsys.telemetry.run_data import WARMUP
from trainsys.telemetry.vectors import BYTES, PLACE, TIMED

Floats = npt.NDArray[np.float64]
CAPTURE = "capture/"
"""A profiler capture is a ``metrics`` record whose names begin so; see ``profiler.capture``."""


@dataclass
class Capture:
    """Shares of a captured step's forward and backward (0..1) on one rank: what phase timers cannot tell apart."""

    step: int
    rank: int
    matmul: float
    """In matrix products."""
    idle: float
    """In which nothing ran on the device: launch gaps, a host that is too slow, synchronising calls."""


@dataclass
class StepTable:
    """Seconds by step and rank ``[T, R]``; nan where a rank left no record of a step.

    ``phases`` sum to ``time``. ``stalls`` stand beside it. A step that was trained again after a restart is here
    once, as it was trained last. ``on_device``: the phases are the device's clock, not the host's.
    """

    ranks: list[int]
    steps: npt.NDArray[np.int64]
    time: Floats
    phases: dict[str, Floats]
    stalls: dict[str, Floats]
    nbytes: dict[str, Floats]
    tokens: Floats
    padded: Floats
    flops_model: Floats
    """Over all ranks, [T]; 0 where unknown."""
    flops_hardware: Floats
    work: npt.NDArray[np.bool_]
    """[T]: every rank of ``ranks`` has it, and it is no warm-up step of an attempt."""
    layout: Layout
    micro: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)
    """rank -> (forward, backward) seconds of its micro-batches, over all its steps, as pairs."""
    calls: dict[int, dict[str, Floats]] = field(default_factory=dict)
    """rank -> phase -> median seconds of its first, second, ... call in a step; of runs with a pipeline."""
    captures: list[Capture] = field(default_factory=list)
    memory: dict[str, Floats] = field(default_factory=dict)
    """allocated, reserved, peak, rss: bytes [T, R]."""
    hosts: dict[int, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    """host -> the switch that it hangs on, where the scheduler tells it."""
    pauses: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """rank -> (step, seconds) of each garbage collection worth a record."""
    on_device: bool = False
    clock_spread_s: float = 0.0
    """How far apart ranks' clocks put the start of one step, at the most."""

    def groups(self, axis: str) -> list[npt.NDArray[np.int64]]:
        """Columns of the ranks that meet in a collective of ``axis``, as arrays [groups, members], one for each
        number of members there is (missing ranks leave smaller groups). Unknown axes have no groups."""
        if axis not in AXES:
            return []
        members = _groups(self.layout, axis)
        column = np.full(self.layout.world, -1, np.int64)
        column[self.ranks] = np.arange(len(self.ranks))
        found = column[members]
        here = (found >= 0).sum(axis=1)
        return [
            np.sort(found[here == n], axis=1)[:, found.shape[1] - n :] for n in np.unique(here) if n > 0
        ]

    def peers(self) -> npt.NDArray[np.int64]:
        """[R]: who does the same work: the ranks of one pipeline stage, by its number (pp is outermost)."""
        return np.asarray(self.ranks, np.int64) // max(1, self.layout.world // self.layout.pp)

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> StepTable:
        """The same of some steps only."""

        def cut(named: dict[str, Floats]) -> dict[str, Floats]:
            return {name: values[rows] for name, values in named.items()}

        return StepTable(
            self.ranks, self.steps[rows], self.time[rows], cut(self.phases), cut(self.stalls), cut(self.nbytes),
            self.tokens[rows], self.padded[rows], self.flops_model[rows], self.flops_hardware[rows],
            self.work[rows], self.layout, self.micro, self.calls, self.captures, cut(self.memory), self.hosts,
            self.switches, self.pauses, self.on_device, self.clock_spread_s,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _groups(layout: Layout, axis: Axis) -> npt.NDArray[np.int64]:
    return np.array(layout.groups(axis), np.int64)


def layout_of(start: RunStart) -> Layout:
    """The run's layout; of a run that did not tell it, plain data parallelism."""
    if start.layout and math.prod(v for k, v in start.layout.items() if k != "ep") == start.world:
        return Layout(**start.layout)
    return Layout(pp=1, dp_replicate=1, dp_shard=start.world, cp=1, tp=1, ep=1)


class _Rows:
    """One rank's records, the last of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}
        self.device: dict[int, DeviceStep] = {}
        self.warm: set[int] = set()
        self.captures: list[tuple[int, dict[str, float | None]]] = []
        self.pauses: list[tuple[int, float]] = []
        self.host = self.switch = ""

    def read(self, path: Path) -> None:
        attempt: list[int] = []
        for event in iter_events(path, Damage()):
            if isinstance(event, RunStart):
                self._close(attempt)
                attempt, self.host, self.switch = [], event.hostname, event.switch
            elif isinstance(event, Step):
                self.steps[event.step] = event
                attempt.append(event.step)
                self.warm.discard(event.step)
            elif isinstance(event, DeviceStep):
                self.device[event.step] = event
            elif isinstance(event, Metrics) and any(name.startswith(CAPTURE) for name in event.values):
                self.captures.append((event.step, event.values))
            elif isinstance(event, Stall) and event.kind == "gc":
                self.pauses.append((event.step, event.seconds))
        self._close(attempt)

    def _close(self, attempt: list[int]) -> None:
        self.warm.update(attempt[: min(WARMUP, len(attempt) // 4)])


def load_steps(run_dir: str | Path, start: RunStart, ranks: Iterable[int]) -> StepTable:
    """The table of a run folder; ``ranks``: those whose files are usable."""
    rows: dict[int, _Rows] = {}
    for rank in sorted(ranks):
        rows[rank] = _Rows()
        rows[rank].read(event_file(run_dir, rank))
    rows = {rank: r for rank, r in rows.items() if r.steps}
    # Where every rank knows its device's time of nearly every step, that is the time to explain.
    on_device = bool(rows) and all(len(r.device) >= 0.9 * len(r.steps) for r in rows.values())
    table = make_table({rank: _timed(r, on_device) for rank, r in rows.items()}, layout_of(start))
    table.on_device = on_device
    warm = set().union(*(r.warm for r in rows.values())) if rows else set()
    # A captured step is slow, and ranks are not in step again before the one after it.
    warm.update(step + late for r in rows.values() for step, _ in r.captures for late in (0, 1))
    table.work &= ~np.isin(table.steps, sorted(warm))
    table.hosts = {rank: r.host for rank, r in rows.items()}
    table.switches = {r.host: r.switch for r in rows.values() if r.switch}
    table.pauses = {rank: r.pauses for rank, r in rows.items() if r.pauses}
    table.captures = [
        Capture(step, rank, float(v.get(CAPTURE + "matmul") or 0.0), float(v.get(CAPTURE + "idle") or 0.0))
        for rank, r in rows.items()
        for step, v in r.captures
    ]
    return table


def _timed(rows: _Rows, on_device: bool) -> list[Step]:
    if not on_device:
        return list(rows.steps.values())
    out = []
    for number, step in rows.steps.items():
        device = rows.device.get(number)
        if device is not None:
            step.step_time_s, step.phases = device.step_time_s, device.phases
            out.append(step)
    return out


def make_table(by_rank: dict[int, Sequence[Step]], layout: Layout) -> StepTable:
    """From step records by rank."""
    ranks = sorted(by_rank)
    steps = np.array(sorted({s.step for found in by_rank.values() for s in found}), np.int64)
    at = {int(step): i for i, step in enumerate(steps)}
    shape = (len(steps), len(ranks))
    time = np.full(shape, np.nan)
    tokens, padded = np.zeros(shape), np.zeros(shape)
    begun = np.full(shape, np.nan)
    model, hardware = np.zeros(len(steps)), np.zeros(len(steps))
    phases: dict[str, Floats] = {}
    stalls: dict[str, Floats] = {}
    nbytes: dict[str, Floats] = {}
    memory = {name: np.zeros(shape) for name in ("allocated", "reserved", "peak", "rss")}
    micro: dict[int, tuple[Floats, Floats]] = {}
    calls: dict[int, dict[str, Floats]] = {}

    def put(into: dict[str, Floats], name: str, t: int, r: int, value: float) -> None:
        if name not in into:
            into[name] = np.zeros(shape)
        into[name][t, r] += value

    for r, rank in enumerate(ranks):
        pairs: list[tuple[float, float]] = []
        for s in by_rank[rank]:
            t = at[s.step]
            time[t, r], tokens[t, r], padded[t, r] = s.step_time_s, s.tokens, s.tokens_padded
            begun[t, r] = s.start_s
            for name, seconds in s.phases.items():
                put(phases, name, t, r, seconds)
            for name, seconds in s.stalls.items():
                put(stalls, name, t, r, seconds)
            for axis, ops in s.comm.items():
                put(nbytes, axis, t, r, sum(c.bytes for c in ops.values()))
            if s.flops is not None:
                model[t] = s.flops.model
                hardware[t] = s.flops.hardware or s.flops.model
            if s.memory is not None:
                for name, held in memory.items():
                    held[t, r] = getattr(s.memory, name)
            forward, backward = s.micro_us.get("forward", []), s.micro_us.get("backward", [])
            pairs += [(f / 1e6, b / 1e6) for f, b in zip(forward, backward, strict=False)]
        if pairs:
            both = np.array(pairs)
            micro[rank] = both[:, 0], both[:, 1]
        if layout.pp > 1:
            calls[rank] = {name: _usual_calls(by_rank[rank], name) for name in ("forward", "backward")}
    whole = np.isfinite(time).all(axis=1) if ranks else np.zeros(0, bool)
    spread = 0.0
    if whole.any() and begun[whole].min() > 0:
        # Ranks end a step together, within a step's time; clocks that are further apart are wrong.
        spread = float(np.median(np.ptp(begun[whole], axis=1)))
    return StepTable(
        ranks, steps, time, phases, stalls, nbytes, tokens, padded, model, hardware, whole, layout, micro, calls,
        memory=memory, clock_spread_s=spread,
    )  # fmt: skip


def _usual_calls(steps: Sequence[Step], phase: str) -> Floats:
    """Median seconds of each call, of the steps that have as many calls as most have."""
    found = [s.micro_us.get(phase, []) for s in steps]
    count = int(np.median([len(f) for f in found]))
    return np.asarray(np.median([f for f in found if len(f) == count] or [[0] * count], axis=0) / 1e6)


def table_of_windows(windows: Sequence[Floats], flops: Sequence[Flops | None], layout: Layout) -> StepTable:
    """From gathered windows ``[V, R]`` (``telemetry.vectors``), each column one rank's mean step; ``flops`` of each."""

    def column(name: str) -> Floats:
        return np.array([w[PLACE[name]] for w in windows])

    def columns(names: Iterable[str]) -> dict[str, Floats]:
        return {name: column(name) for name in names if any(w[PLACE[name]].any() for w in windows)}

    time = column("step_time_s")
    pauses = column("stalls_s")
    return StepTable(
        list(range(windows[0].shape[1])), column("step")[:, 0].astype(np.int64), time, columns(TIMED),
        {"all": pauses} if pauses.any() else {},
        {name[len(BYTES) :]: values for name, values in columns(BYTES + a for a in COMM_AXES).items()},
        column("tokens"), column("tokens_padded"),
        np.array([f.model if f else 0.0 for f in flops]),
        np.array([(f.hardware or f.model) if f else 0.0 for f in flops]),
        np.asarray(np.isfinite(time).all(axis=1)), layout,
        memory={name: column(name) for name in ("allocated", "reserved", "peak", "rss")},
    )  # fmt: skip


def axes_of(table: StepTable) -> list[str]:
    """Axes that communicated, as they are named in phases."""
    return sorted(name[len(COMM) :] for name in table.phases if name.startswith(COMM))
