"""Steps as arrays: step by rank. What waterfall and blame are made of; ``profiler.run_steps`` reads them from a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainsys.layout import AXES, Axis, Layout
from trainsys.telemetry.events import COMM, COMM_AXES, Flops, RunStart, Step
from trainsys.telemetry.records import gathered
from trainsys.telemetry.step_columns import StepColumns
from trainsys.telemetry.vectors import BYTES, HOST, PLACE, TIMED

if TYPE_CHECKING:
    from trainsys.profiler.expected import StageWork

Floats = npt.NDArray[np.float64]
CAPTURE = "capture/"
"""A profiler capture is a ``metrics`` record whose names begin so; see ``profiler.capture``."""
WINDOW = 200
"""Steps of a run that are read, and judged, at a time; what lasts over several windows is one verdict."""
MEMORY = ("allocated", "reserved", "peak", "rss")


@dataclass
class Capture:
    """Shares of a captured step's forward and backward (0..1) on one rank: what phase timers cannot tell apart."""

    step: int
    rank: int
    matmul: float
    """In matmuls."""
    idle: float
    """In which nothing ran on the device: launch gaps, a host that is too slow, synchronising calls."""


@dataclass
class Pairs:
    """Forward and backward seconds of one rank's micro-batches, as sums over all of them: all that their means, spreads
    and correlation need."""

    count: int = 0
    forward: float = 0.0
    backward: float = 0.0
    forward_squares: float = 0.0
    backward_squares: float = 0.0
    products: float = 0.0

    def add(self, forward: Floats, backward: Floats) -> None:
        """[n] each."""
        self.count += forward.size
        self.forward += float(forward.sum())
        self.backward += float(backward.sum())
        self.forward_squares += float((forward**2).sum())
        self.backward_squares += float((backward**2).sum())
        self.products += float((forward * backward).sum())


@dataclass(frozen=True)
class OfRun:
    """What holds for a run and not for each of its windows."""

    flops_known: bool
    """Every step told its FLOPs."""
    padded: bool
    """Some step had padding."""
    late: npt.NDArray[np.bool_] | None = None
    """[R]: late for good (``profiler.waits``); None where that is not known yet."""


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
    micro: dict[int, Pairs] = field(default_factory=dict)
    """rank -> forward and backward of its micro-batches, over all steps of the run."""
    calls: dict[int, dict[str, Floats]] = field(default_factory=dict)
    """rank -> phase -> median seconds of its first, second, ... call in a step; of runs with a pipeline."""
    captures: list[Capture] = field(default_factory=list)
    memory: dict[str, Floats] = field(default_factory=dict)
    """allocated, reserved, peak, rss: bytes [T, R]."""
    host: dict[str, Floats] = field(default_factory=dict)
    """The kernel's counters since the process began [T, R] (``telemetry.events.HostTime``); of an older run 0."""
    hosts: dict[int, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    """host -> the switch that it hangs on, where the scheduler tells it."""
    on_device: bool = False
    apart_s: Floats | None = None
    """[T]: how far apart ranks' clocks put the start of a step; nan where one does not tell."""
    of_run: OfRun | None = None
    """For a window of a run: what the window alone does not tell."""
    stages: StageWork | None = None
    """What each pipeline stage has to compute, where it is known."""
    begun: Floats | None = None
    """[T, R]: when each step began by the rank's own clock (s since the epoch), stalls before it included."""

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
            self.work[rows], self.layout, self.micro, self.calls, self.captures, cut(self.memory), cut(self.host),
            self.hosts, self.switches, self.on_device, None if self.apart_s is None else self.apart_s[rows], self.of_run,
            self.stages,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _groups(layout: Layout, axis: Axis) -> npt.NDArray[np.int64]:
    return np.array(layout.groups(axis), np.int64)


def window_count(steps: int) -> int:
    """In how many windows so many steps are judged."""
    return max(1, round(steps / WINDOW))


def layout_of(start: RunStart) -> Layout:
    """The run's layout; of a run that did not tell it, plain data parallelism."""
    if start.layout and math.prod(v for k, v in start.layout.items() if k != "ep") == start.world:
        return Layout(**start.layout)
    return Layout(pp=1, dp_replicate=1, dp_shard=start.world, cp=1, tp=1, ep=1)


def empty_table(ranks: Sequence[int], steps: npt.NDArray[np.int64], layout: Layout) -> StepTable:
    """No record yet; ``fill`` puts them in."""
    shape = (len(steps), len(ranks))
    return StepTable(
        list(ranks), steps, np.full(shape, np.nan), {}, {}, {}, np.zeros(shape), np.zeros(shape), np.zeros(len(steps)),
        np.zeros(len(steps)), np.zeros(len(steps), bool), layout, apart_s=np.full(len(steps), np.nan),
        memory={name: np.zeros(shape) for name in MEMORY}, host={name: np.zeros(shape) for name in HOST},
    )  # fmt: skip


def fill(table: StepTable, column: int, steps: StepColumns, device: StepColumns | None = None) -> Floats:
    """Puts a rank's steps, all of them in the table, into its column; the times of those that ``device`` has are its.
    Returns when each began [T], nan where that is not told."""
    shape = table.time.shape

    def put(into: dict[str, Floats], found: StepColumns, rows: npt.NDArray[np.int64], named: dict[str, Floats]) -> None:
        for name, values in named.items():
            if name not in into:
                into[name] = np.zeros(shape)
            into[name][rows, column] = values

    rows = np.searchsorted(table.steps, steps.step)
    timed, at_rows = (steps, rows) if device is None else (device, np.searchsorted(table.steps, device.step))
    table.time[at_rows, column] = timed.of("step_time_s")
    put(table.phases, timed, at_rows, timed.named("phases"))
    put(table.stalls, steps, rows, steps.named("stalls"))
    put(table.nbytes, steps, rows, steps.nbytes)
    put(table.memory, steps, rows, {name: steps.of("memory", name) for name in MEMORY})
    put(table.host, steps, rows, {name: steps.of("host", name) for name in HOST})
    table.tokens[rows, column], table.padded[rows, column] = steps.of("tokens"), steps.of("tokens_padded")
    counted = steps.has("flops", "model")
    model, hardware = steps.of("flops", "model"), steps.of("flops", "hardware")
    table.flops_model[rows[counted]] = model[counted]
    table.flops_hardware[rows[counted]] = np.where(hardware > 0, hardware, model)[counted]
    begun = np.full(len(table.steps), np.nan)
    begun[rows] = steps.of("start_s")
    return begun


def make_table(by_rank: dict[int, Sequence[Step]], layout: Layout) -> StepTable:
    """From step records by rank."""
    columns = {rank: StepColumns(gathered(by_rank[rank])) for rank in sorted(by_rank)}
    steps = np.array(sorted({s.step for found in by_rank.values() for s in found}), np.int64)
    table = empty_table(list(columns), steps, layout)
    for column, (rank, found) in enumerate(columns.items()):
        fill(table, column, found)
        calls = Calls()
        calls.add(call_times(found))
        if calls.pairs.count:
            table.micro[rank] = calls.pairs
        if layout.pp > 1:
            table.calls[rank] = calls.usual()
    table.work = np.asarray(np.isfinite(table.time).all(axis=1)) if columns else table.work
    return table


CallTimes = dict[str, tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]]
"""phase -> microseconds of its single calls [T, most], and how many of them each step tells [T]."""


def call_times(steps: StepColumns) -> CallTimes:
    found = {phase: steps.calls_us(phase) for phase in ("forward", "backward")}
    return {phase: (times.astype(np.uint32), counts) for phase, (times, counts) in found.items()}


class Calls:
    """One rank's single calls of forward and backward."""

    def __init__(self) -> None:
        self.pairs = Pairs()
        self._told: dict[str, list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]]] = {}

    def add(self, told: CallTimes, which: npt.NDArray[np.bool_] | slice = slice(None)) -> None:
        found = {phase: (times[which], counts[which]) for phase, (times, counts) in told.items()}
        both = np.minimum(found["forward"][1], found["backward"][1])
        for place in range(int(both.max(initial=0))):
            rows = both > place
            self.pairs.add(found["forward"][0][rows, place] / 1e6, found["backward"][0][rows, place] / 1e6)
        for phase, (times, counts) in found.items():
            if counts.any():
                self._told.setdefault(phase, []).append((times[counts > 0], counts[counts > 0]))

    def usual(self) -> dict[str, Floats]:
        """phase -> median seconds of each call, of the steps that have as many calls as most have that tell them."""
        out = {}
        for phase in ("forward", "backward"):
            told = self._told.get(phase, [])
            counts = np.concatenate([c for _, c in told]) if told else np.zeros(1, np.int64)
            most = int(np.median(counts))
            like = [times[c == most, :most] for times, c in told if times.shape[1] >= most]
            rows = np.concatenate(like) if like else np.zeros((0, most))
            out[phase] = np.asarray(np.median(rows, axis=0) / 1e6) if len(rows) else np.zeros(most)
        return out


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
        memory={name: column(name) for name in MEMORY}, host={name: column(name) for name in HOST},
    )  # fmt: skip


def axes_of(table: StepTable) -> list[str]:
    """Axes that communicated, as they are named in phases."""
    return sorted(name[len(COMM) :] for name in table.phases if name.startswith(COMM))
