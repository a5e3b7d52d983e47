"""Steps of one rank as arrays: the fields of ``Step`` and ``DeviceStep`` from ``Records``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainsys.telemetry.events import AnyEvent, RunStart
from trainsys.telemetry.records import Floats, Ints, Mask, Records, at

STEP, DEVICE = "step", "device_step"


class StepColumns:
    """Some records' steps. Each array is [n], in their order."""

    def __init__(self, records: Records, event: str = STEP, rows: Ints | None = None) -> None:
        self.records, self.event = records, event
        self.rows: Ints = np.flatnonzero(records.of(event)) if rows is None else rows
        """Which of the records they are."""

    def __len__(self) -> int:
        return int(self.rows.size)

    def cut(self, which: Ints | Mask | slice) -> StepColumns:
        """The same of some of them."""
        return StepColumns(self.records, self.event, self.rows[which])

    def of(self, *path: str) -> Floats:
        """A number of each step; 0 where it is not there."""
        return np.asarray(self.records.column(self.event, *path)[0][self.rows])

    def has(self, *path: str) -> Mask:
        """Where it is there."""
        return np.asarray(self.records.column(self.event, *path)[1][self.rows])

    def named(self, *path: str) -> dict[str, Floats]:
        """All numbers under ``path`` that some of the steps have."""
        found = {name: self.records.column(self.event, *path, name) for name in self.records.names(self.event, *path)}
        return {name: values[self.rows] for name, (values, there) in found.items() if there[self.rows].any()}

    @property
    def step(self) -> Ints:
        return self.of("step").astype(np.int64)

    @property
    def stalled_s(self) -> Floats:
        """Seconds of stalls before the step's end."""
        return sum(self.named("stalls").values(), start=np.zeros(len(self)))

    @property
    def nbytes(self) -> dict[str, Floats]:
        """axis -> bytes."""
        ops = {axis: self.records.names(self.event, "comm", axis) for axis in self.records.names(self.event, "comm")}
        return {axis: np.sum([self.of("comm", axis, at(op, 1)) for op in found], axis=0) for axis, found in ops.items()}

    def calls_us(self, phase: str) -> tuple[Floats, Ints]:
        """Microseconds of the single calls of ``phase`` [n, most], and how many each step tells [n]."""
        columns: list[Floats] = []
        counts = np.zeros(len(self), np.int64)
        while (there := self.has("micro_us", at(phase, len(columns)))).any():
            columns.append(self.of("micro_us", at(phase, len(columns))))
            counts += there
        return (np.stack(columns, axis=1) if columns else np.zeros((len(self), 0))), counts


def by_attempt(records: Records) -> Iterator[tuple[RunStart | None, list[AnyEvent], StepColumns, StepColumns]]:
    """The records cut where an attempt starts: its first record (None: it started before these), what is neither a step
    nor that, its steps, and its device's steps."""
    starts = np.flatnonzero(records.of("run_start"))
    others = np.flatnonzero(~(records.of(STEP) | records.of(DEVICE)))
    events = list(records.events(but=(STEP, DEVICE)))
    steps, device = StepColumns(records), StepColumns(records, DEVICE)
    for low, high in zip([-1, *starts.tolist()], [*starts.tolist(), len(records)], strict=True):
        told = [e for row, e in zip(others.tolist(), events, strict=True) if low <= row < high and e is not None]
        first = told.pop(0) if told and isinstance(told[0], RunStart) else None
        cut = [c.cut((low <= c.rows) & (c.rows < high)) for c in (steps, device)]
        if first is not None or told or len(cut[0]) or len(cut[1]):
            yield first if isinstance(first, RunStart) else None, told, cut[0], cut[1]
