"""Nsight Systems' SQLite export (``nsys export --type sqlite``) to a ``RankTrace``: kernels, copies, NVTX, CUDA API."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainsys.errors import UserError
from trainsys.profiler.trace import columns as col
from trainsys.profiler.trace.collect import clean
from trainsys.profiler.trace.intervals import Ints

_KERNEL, _COPY, _SET = (f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET"))
_API, _NVTX = "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"
_COPIES = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}


def read_nsight(path: Path) -> col.RankTrace:
    """Times in ns of the session's own clock. Raises UserError for a database that is not such an export."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as base:
            return _read(path, base)
    except sqlite3.Error as error:
        raise UserError(f"{path}: an SQLite file that cannot be read: {error}") from None


def _read(path: Path, base: sqlite3.Connection) -> col.RankTrace:
    tables = {
        name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
    }
    if not tables & {_KERNEL, _COPY, _API}:
        raise UserError(
            f"{path}: an SQLite file without CUDA activities: record with `nsys profile --trace=cuda,nvtx` and export it "
            "with `nsys export --type sqlite`"
        )
    trace = col.RankTrace(path, -1, 0, size_bytes=path.stat().st_size)
    strings: dict[int, str] = (
        dict(base.execute("SELECT id, value FROM StringIds")) if "StringIds" in tables else {}
    )
    names: dict[str, int] = {}

    def name_of(text: Any) -> int:
        return names.setdefault(clean(str(text)), len(names))

    rows: list[tuple[int, ...]] = []
    if _KERNEL in tables:
        columns = _columns(base, _KERNEL)
        name = "demangledName" if "demangledName" in columns else "shortName"
        graph = "graphNodeId" if "graphNodeId" in columns else "0"
        query = f"SELECT start, end, {name}, deviceId, streamId, correlationId, {graph} FROM {_KERNEL}"
        rows += [
            (s, e, name_of(strings.get(n, n)), col.KERNEL, d, st, c, -1, -1, g or 0, -1)
            for s, e, n, d, st, c, g in base.execute(query)
        ]
    if _COPY in tables:
        query = f"SELECT start, end, copyKind, deviceId, streamId, correlationId, bytes FROM {_COPY}"
        rows += [
            (s, e, name_of(f"Memcpy {_COPIES.get(k, k)}"), col.MEMCPY, d, st, c, -1, b, 0, -1)
            for s, e, k, d, st, c, b in base.execute(query)
        ]
    if _SET in tables:
        query = f"SELECT start, end, deviceId, streamId, correlationId, bytes FROM {_SET}"
        rows += [
            (s, e, name_of("Memset"), col.MEMSET, d, st, c, -1, b, 0, -1)
            for s, e, d, st, c, b in base.execute(query)
        ]
    if rows:
        trace.device = col.Activities(*_sorted(rows))
    if _API in tables:
        query = f"SELECT start, end, nameId, globalTid, correlationId FROM {_API} WHERE end IS NOT NULL"
        calls = [
            (s, e, name_of(re.sub(r"_v\d+$", "", str(strings.get(n, n)))), t, c)
            for s, e, n, t, c in base.execute(query)
        ]
        if calls:
            trace.runtime = col.Calls(*_sorted(calls))
    if _NVTX in tables:
        columns = _columns(base, _NVTX)
        text = "textId" if "textId" in columns else "NULL"
        query = f"SELECT start, end, text, {text}, globalTid FROM {_NVTX} WHERE end > start"
        notes = [
            (s, e, name_of(t if t is not None else strings.get(i, "")), tid or 0, -1)
            for s, e, t, i, tid in base.execute(query)
        ]
        if notes:
            trace.notes = col.Calls(*_sorted(notes))
    if "TARGET_INFO_GPU" in tables:
        known = _columns(base, "TARGET_INFO_GPU")
        if {"id", "name"} <= known:
            memory = "totalMemory" if "totalMemory" in known else "0"
            for i, gpu, size in base.execute(f"SELECT id, name, {memory} FROM TARGET_INFO_GPU"):
                trace.devices[int(i)] = (str(gpu), int(size or 0))
    trace.names = list(names)
    parts = [p for p in (trace.device, trace.runtime, trace.notes) if len(p)]
    trace.n_events = sum(len(p) for p in parts)
    if parts:
        trace.span = (min(int(p.start.min()) for p in parts), max(int(p.end.max()) for p in parts))
    return trace


def _columns(base: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in base.execute(f"PRAGMA table_info({table})")}


def _sorted(rows: Sequence[tuple[int, ...]]) -> list[Ints]:
    table = np.array(rows, np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return [np.ascontiguousarray(c) for c in table.T]
