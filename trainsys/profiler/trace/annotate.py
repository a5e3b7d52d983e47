"""The timeline with the verdicts in it, as Chrome trace events: open it in Perfetto or chrome://tracing.

One process a rank: a track a stream with its kernels, and beneath tracks of trainsys's own: steps, exposed
communication, idle time by cause, recomputation, and on the slowest rank what held the critical path. Written
event by event; times are exact (microseconds with three decimals).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainsys.errors import UserError
from trainsys.profiler.trace import intervals as iv
from trainsys.profiler.trace.analyse import Loaded, Options, load
from trainsys.profiler.trace.breakdown import comm_group, recomputed
from trainsys.profiler.trace.classify import CLASS_NAMES, COMM, COMPUTE
from trainsys.profiler.trace.critical import stretches
from trainsys.profiler.trace.idle import IdleFinder
from trainsys.profiler.trace.link import find_steps
from trainsys.profiler.trace.report import Report

_TRACKS = {
    "verdicts": 1,
    "steps": 2,
    "exposed communication": 3,
    "idle by cause": 4,
    "recompute": 5,
    "critical path": 6,
}
_FIRST_STREAM = 100


def write_annotated(report: Report, path: Path, options: Options) -> None:
    """One file for all ranks of the report; gzip if its name ends in ``.gz``. Reads each trace again."""
    try:
        with gzip.open(path, "wt", compresslevel=4) if path.suffix == ".gz" else path.open("w") as file:
            file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
            first = True
            low = min((r.breakdown.whole.start for r in report.ranks if r.breakdown is not None), default=0)
            for rank in report.ranks:
                loaded = load(Path(rank.path), options, rank.lane)
                for event in _rank_events(loaded, rank.rank, report, low):
                    file.write(("" if first else ",\n") + event)
                    first = False
            file.write("\n]}\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def _event(
    pid: int, tid: int, name: str, cat: str, start: int, end: int, args: dict[str, Any] | None = None
) -> str:
    text = f'{{"ph":"X","pid":{pid},"tid":{tid},"name":{json.dumps(name)},"cat":"{cat}",'
    text += f'"ts":{_us(start)},"dur":{_us(end - start)}'
    return text + (f',"args":{json.dumps(args)}}}' if args else "}")


def _name(pid: int, what: str, name: str, tid: int = 0, order: int | None = None) -> Iterator[str]:
    yield json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": f"{what}_name", "args": {"name": name}})
    if order is not None:
        yield json.dumps(
            {"ph": "M", "pid": pid, "tid": tid, "name": f"{what}_sort_index", "args": {"sort_index": order}}
        )


def _rank_events(loaded: Loaded, rank: int, report: Report, low: int) -> Iterator[str]:
    trace, kinds = loaded.trace, loaded.kinds
    device = trace.device
    yield from _name(rank, "process", f"rank {rank}", order=rank)
    for track, tid in _TRACKS.items():
        yield from _name(rank, "thread", track, tid, tid)
    lanes = {int(s): _FIRST_STREAM + i for i, s in enumerate(np.unique(device.stream))}
    for stream, tid in lanes.items():
        yield from _name(rank, "thread", f"stream {stream}", tid, tid)
    labels = [comm_group(trace, i) for i in range(len(trace.comm_meta))]
    for i in range(len(device)):
        args = {}
        if kinds[i] == COMM and device.comm[i] >= 0:
            args = {"group": labels[device.comm[i]][0], "axis": labels[device.comm[i]][1]}
        yield _event(
            rank,
            lanes[int(device.stream[i])],
            trace.names[device.name[i]],
            CLASS_NAMES[kinds[i]],
            int(device.start[i]) - low,
            int(device.end[i]) - low,
            args,
        )
    if not len(device):
        return
    yield from _annotations(loaded, rank, report, low)


def _annotations(loaded: Loaded, rank: int, report: Report, low: int) -> Iterator[str]:
    trace, kinds, device = loaded.trace, loaded.kinds, loaded.trace.device
    begin, finish = int(device.start.min()), int(device.end.max())
    compute = iv.union(device.start[kinds <= COMPUTE], device.end[kinds <= COMPUTE])
    comm = iv.union(device.start[kinds == COMM], device.end[kinds == COMM])
    busy = iv.union(device.start, device.end)
    for step in find_steps(trace, loaded.launches):
        yield _event(rank, _TRACKS["steps"], f"step {step.number}", "step", step.start - low, step.end - low)
    for a, b in zip(*iv.subtract(comm, compute), strict=True):
        yield _event(
            rank,
            _TRACKS["exposed communication"],
            "exposed communication",
            "verdict",
            int(a) - low,
            int(b) - low,
        )
    idle = IdleFinder(trace, loaded.launches)
    gaps = iv.complement(busy, begin, finish)
    for a, b, cause in zip(*gaps, idle.main_cause(gaps), strict=True):
        yield _event(rank, _TRACKS["idle by cause"], f"idle: {cause}", "verdict", int(a) - low, int(b) - low)
    again = np.flatnonzero(recomputed(trace, kinds, loaded.launches))
    for a, b in zip(*iv.union(device.start[again], device.end[again]), strict=True):
        yield _event(rank, _TRACKS["recompute"], "recompute", "verdict", int(a) - low, int(b) - low)
    if rank == report.critical_rank:
        for part in stretches(trace, kinds, loaded.launches):
            name = f"{part.kind}: {part.name}"
            yield _event(rank, _TRACKS["critical path"], name, "verdict", part.start - low, part.end - low)
    about = [v for v in report.verdicts if f"rank {rank} " in v.title or "rank " not in v.title]
    for verdict in about[:1]:
        yield _event(
            rank,
            _TRACKS["verdicts"],
            verdict.title,
            "verdict",
            begin - low,
            finish - low,
            {"all": [{"title": v.title, "why": v.evidence, "try": v.advice} for v in about]},
        )
