"""A run's steps from its event files, a window at a time: what is kept of a rank is where its records are.

While ``telemetry.run_data.load_run`` reads the files, ``RunSteps.visit`` notes which steps each part of them holds. Then
any of them can be read as a ``StepTable``. So memory grows with a window times ranks, not with steps times ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainsys.profiler.expected import StageWork
from trainsys.profiler.steps import (
    CAPTURE,
    WINDOW,
    Calls,
    CallTimes,
    Capture,
    Floats,
    OfRun,
    Pairs,
    StepTable,
    call_times,
    empty_table,
    fill,
    layout_of,
    window_count,
)
from trainsys.telemetry.events import Finding, Metrics
from trainsys.telemetry.reader import Place
from trainsys.telemetry.records import Records
from trainsys.telemetry.run_data import WARMUP, RunData, load_run
from trainsys.telemetry.step_columns import DEVICE, STEP, StepColumns, by_attempt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
CACHED = 128
"""Ranks of which what was read last is kept: the next window begins in the parts of files where this one ends."""


@dataclass
class _Part:
    """Some records of a rank: their steps by type. Once the rank is read whole, of those only the first and last number,
    and which are ``live``: not replaced by a later record of the same step (None: all)."""

    place: Place
    steps: dict[str, Ints]
    live: dict[str, Mask | None] = field(default_factory=dict)


@dataclass
class _Rank:
    host: str = ""
    switch: str = ""
    pp: int = 1
    count: int = 0
    parts: list[_Part] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    # Only while it is read:
    begins: list[int] = field(default_factory=list)
    """How many steps came before each attempt."""
    calls: list[CallTimes] = field(default_factory=list)
    counted: list[Ints] = field(default_factory=list)
    """Steps that tell their FLOPs."""


class _Counted:
    """How many ranks have each step."""

    def __init__(self) -> None:
        self.steps: Ints = np.zeros(0, np.int64)
        self.ranks: Ints = np.zeros(0, np.int64)

    def add(self, steps: Ints) -> None:
        """Those of one more rank, in order."""
        if not np.array_equal(steps, self.steps):
            both = np.union1d(self.steps, steps)
            ranks = np.zeros(both.size, np.int64)
            ranks[np.searchsorted(both, self.steps)] = self.ranks
            self.steps, self.ranks = both, ranks
        self.ranks = self.ranks + np.isin(self.steps, steps)


class RunSteps:
    """``visit`` is shown all records, rank by rank; ``finish`` makes it ready. Over the steps that any rank has [T]:
    ``steps`` are their numbers, ``whole`` those that every rank has, ``work`` those of them that count in means."""

    def __init__(self) -> None:
        self._of: dict[int, _Rank] = {}
        self._open: int | None = None
        self._timed = {STEP: _Counted(), DEVICE: _Counted()}
        self._counted = _Counted()
        self._every_device, self._padded = True, False
        self._warm: set[int] = set()
        self._names: dict[str, list[str]] = {"phases": [], "stalls": [], "comm": []}
        self._micro: dict[int, Pairs] = {}
        self._calls: dict[int, dict[str, Floats]] = {}
        self._cache: dict[int, dict[int, Records]] = {}

    # ---- while the files are read ----------------------------------------------------------------

    def visit(self, rank: int, records: Records, place: Place) -> None:
        if rank != self._open:
            self._close()
            self._open, self._of[rank] = rank, _Rank()
        of = self._of[rank]
        for start, others, steps, _ in by_attempt(records):
            if start is not None:
                of.begins.append(of.count)
                of.host, of.switch, of.pp = start.hostname, start.switch, start.layout.get("pp", 1)
            of.count += len(steps)
            for event in others:
                if isinstance(event, Finding):
                    of.findings.append(event)
                elif isinstance(event, Metrics) and any(name.startswith(CAPTURE) for name in event.values):
                    matmul, idle = (float(event.values.get(CAPTURE + name) or 0.0) for name in ("matmul", "idle"))
                    of.captures.append(Capture(event.step, rank, matmul, idle))
        steps, device = StepColumns(records), StepColumns(records, DEVICE)
        if not (len(steps) or len(device)):
            return
        of.parts.append(_Part(place, {STEP: steps.step, DEVICE: device.step}))
        of.calls.append(call_times(steps))
        of.counted.append(steps.step[steps.of("flops", "model") > 0])
        self._padded |= bool(steps.of("tokens_padded").any())
        for name, known in self._names.items():
            found = [n for event in (STEP, DEVICE) for n in records.names(event, name)]
            known += [n for n in dict.fromkeys(found) if n not in known]

    def _close(self) -> None:
        """The rank under way is read whole."""
        rank = self._open
        if rank is None:
            return
        of = self._of[rank]
        if not of.count:
            del self._of[rank]
            return
        numbers = {event: np.concatenate([part.steps[event] for part in of.parts]) for event in (STEP, DEVICE)}
        live = {event: _last_of_each(found) for event, found in numbers.items()}
        begins = of.begins or [0]
        for begin, end in zip(begins, [*begins[1:], of.count], strict=True):
            first = slice(begin, begin + min(WARMUP, (end - begin) // 4))
            self._warm.update(numbers[STEP][first][live[STEP][first]].tolist())
        calls = Calls()
        at = {STEP: 0, DEVICE: 0}
        for part, told in zip(of.parts, of.calls, strict=True):
            for event, steps in part.steps.items():
                mine = live[event][at[event] : at[event] + steps.size]
                at[event] += steps.size
                part.live[event] = None if mine.all() else mine
                part.steps[event] = np.array([steps.min(), steps.max()]) if steps.size else steps
                if event == STEP:
                    calls.add(told, mine)
        if calls.pairs.count:
            self._micro[rank] = calls.pairs
        if of.pp > 1:
            self._calls[rank] = calls.usual()
        own, device = np.unique(numbers[STEP]), np.unique(numbers[DEVICE])
        self._every_device &= device.size >= 0.9 * own.size
        self._timed[STEP].add(own)
        self._timed[DEVICE].add(np.intersect1d(own, device))
        self._counted.add(np.unique(np.concatenate(of.counted)))
        of.calls, of.counted = [], []

    def finish(self, run: RunData) -> RunSteps:
        """All files are read, and ``run`` is what they say."""
        self._close()
        self._open = None
        self.layout = layout_of(run.start)
        self.stages: StageWork | None = None
        self.ranks = sorted(self._of)
        # Where every rank knows its device's time of nearly every step, that is the time to explain.
        self.on_device = bool(self.ranks) and self._every_device
        timed = self._timed[DEVICE if self.on_device else STEP]
        self.steps: Ints = timed.steps
        self.whole: Mask = np.asarray(timed.ranks == len(self.ranks))
        self.hosts = {rank: of.host for rank, of in sorted(self._of.items())}
        self.switches = {of.host: of.switch for of in self._of.values() if of.switch}
        self.captures = [c for _, of in sorted(self._of.items()) for c in of.captures]
        self.findings = [f for of in self._of.values() for f in of.findings]
        # A captured step is slow, and ranks are not in step again before the one after it.
        out = self._warm | {c.step + late for c in self.captures for late in (0, 1)}
        self.work: Mask = self.whole & ~np.isin(self.steps, sorted(out))
        self.of_run = OfRun(bool(np.isin(self.steps, self._counted.steps).all()), self._padded)
        return self

    # ---- once they have been ---------------------------------------------------------------------

    def windows(self) -> Iterator[tuple[Ints, StepTable]]:
        """(rows, table of them): those of steps that are whole, in order and with about ``WINDOW`` steps of work each,
        then the others."""
        work = np.flatnonzero(self.work)
        begins = [int(piece[0]) for piece in np.array_split(work, window_count(work.size)) if piece.size]
        whole = np.flatnonzero(self.whole)
        pieces = np.split(whole, np.searchsorted(whole, begins[1:]))
        others = np.flatnonzero(~self.whole)
        pieces += np.array_split(others, window_count(others.size))
        for rows in pieces:
            # Where nearly every step is captured there are few of work, and more windows.
            for piece in np.array_split(rows, -(-rows.size // (4 * WINDOW)) or 1):
                if piece.size:
                    yield piece, self.table(piece)

    def table(self, rows: Ints) -> StepTable:
        """Some steps, read from the files; ``rows`` [n] in order."""
        steps = self.steps[rows]
        table = empty_table(self.ranks, steps, self.layout)
        for name in self._names["phases"]:
            table.phases[name] = np.zeros(table.time.shape)
        for name in self._names["stalls"]:
            table.stalls[name] = np.zeros(table.time.shape)
        begun = np.full(table.time.shape, np.nan)
        for column, rank in enumerate(self.ranks if rows.size else ()):
            for host, device in self._read(rank, steps):
                started = fill(table, column, host, device if self.on_device else None)
                begun[:, column] = np.where(np.isnan(started), begun[:, column], started)
        told = np.asarray((begun > 0).all(axis=1))
        table.apart_s = np.where(told, np.ptp(begun, axis=1) if begun.size else 0.0, np.nan)
        table.begun = begun
        table.work = self.work[rows]
        table.hosts, table.switches, table.captures = self.hosts, self.switches, self.captures
        table.micro, table.calls, table.on_device = self._micro, self._calls, self.on_device
        table.of_run, table.stages = self.of_run, self.stages
        return table

    def column(self, rank: int, *path: str) -> Floats:
        """A number of each step of one rank [T], 0 where it is not there."""
        out = np.zeros(self.steps.size)
        for host, _ in self._read(rank, self.steps) if self.steps.size else ():
            out[np.searchsorted(self.steps, host.step)] = host.of(*path)
        return out

    def _read(self, rank: int, steps: Ints) -> Iterator[tuple[StepColumns, StepColumns]]:
        """For each part of a rank's file, its live records of ``steps``, and its device's."""
        for number, part in enumerate(self._of[rank].parts):
            spans = [s for s in part.steps.values() if s.size and s[0] <= steps[-1] and s[1] >= steps[0]]
            if not spans:
                continue
            records = self._records(rank, number, part)
            cut = []
            for event in (STEP, DEVICE):
                found = StepColumns(records, event)
                live = part.live[event]
                found = found if live is None else found.cut(live)
                cut.append(found.cut(np.isin(found.step, steps)))
            yield cut[0], cut[1]

    def _records(self, rank: int, number: int, part: _Part) -> Records:
        mine = self._cache.pop(rank, {})
        records = mine.pop(number, None) or part.place.read()
        while len(self._cache) >= CACHED:
            del self._cache[next(iter(self._cache))]
        # This one and the one before: those in which a window ends and the next one begins.
        self._cache[rank] = {**dict(list(mine.items())[-1:]), number: records}
        return records


def _last_of_each(numbers: Ints) -> Mask:
    """[n]: no later one is the same."""
    out = np.zeros(numbers.size, bool)
    out[numbers.size - 1 - np.unique(numbers[::-1], return_index=True)[1]] = True
    return out


def read_run(run_dir: str | Path) -> tuple[RunData, RunSteps]:
    """A run's totals and its steps. Raises ``UserError`` where there is no run at all."""
    steps = RunSteps()
    run = load_run(run_dir, steps.visit)
    return run, steps.finish(run)


def load_steps(run_dir: str | Path) -> StepTable:
    """All steps of a small run at once."""
    _, steps = read_run(run_dir)
    return steps.table(np.arange(steps.steps.size))
