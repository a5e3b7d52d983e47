"""A trace file to a ``RankTrace``: streaming, typed, exact to the nanosecond, O(device activities) memory."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from trainsys.profiler.trace.collect import Collector
from trainsys.profiler.trace.columns import RankTrace
from trainsys.profiler.trace.source import SQLITE_MAGIC, Limits, Source
from trainsys.profiler.trace.split import Meta, Splitter

_RANK_IN_NAME = re.compile(r"(?:rank|worker|gpu|_r|^r)[-_ ]?(\d+)", re.I)


def read_trace(path: str | Path, *, limits: Limits | None = None, keep_truncated: bool = False) -> RankTrace:
    """Read one profiler trace (JSON or gzip of it, any framework that writes Chrome trace events).

    Times come back in ns exactly as written. Raises UserError naming file and offset for what is not
    a trace, is damaged beyond repair, or exceeds ``limits``; ``keep_truncated`` reads the whole
    events of a file that was cut off. What was mended or dropped is counted in ``RankTrace.said``.
    """
    path = Path(path)
    if is_sqlite(path):
        from trainsys.profiler.trace.nsight import read_nsight

        trace = read_nsight(path)
        _rank_by_name(trace)
        name_device(trace)
        return trace
    read = _read(path, limits, keep_truncated, exact=False)
    return read if read is not None else _must(_read(path, limits, keep_truncated, exact=True))


def is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False  # whoever reads it says why it cannot be


def _must(trace: RankTrace | None) -> RankTrace:
    assert trace is not None, "exact decoding never asks for exact decoding"
    return trace


def _read(path: Path, limits: Limits | None, keep_truncated: bool, *, exact: bool) -> RankTrace | None:
    """None where doubles would lose nanoseconds (decimals on a 1970 epoch): to be read again exactly."""
    source = Source(path, limits)
    splitter = Splitter(source, keep_truncated=keep_truncated)
    splitter.decoder.exact = exact
    collector = Collector(path, splitter.decoder)
    # Nothing here makes cycles, and hundreds of thousands of new objects a second keep the collector busy.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for events in splitter:
            if not collector.add(events):
                return None
    finally:
        if collecting:
            gc.enable()
    trace = collector.finish()
    trace.n_events, trace.size_bytes = splitter.n_events, source.offset
    _header(trace, splitter.meta)
    return trace


def _header(trace: RankTrace, meta: Meta) -> None:
    base = _value(meta, "baseTimeNanoseconds", int, 0)
    if base:
        trace.base_ns = base
        for part in (trace.device, trace.runtime, trace.notes, trace.ops):
            part.start += base
            part.end += base
        trace.host_busy = (trace.host_busy[0] + base, trace.host_busy[1] + base)
        trace.span = (trace.span[0] + base, trace.span[1] + base)
    info = _value(meta, "distributedInfo", dict, {})
    rank, world = info.get("rank"), info.get("world_size")
    trace.backend = str(info.get("backend", ""))
    trace.host = _value(meta, "host_name", str, "")
    for group in info.get("pg_config") or []:
        if isinstance(group, dict) and isinstance(group.get("ranks"), list):
            ranks = tuple(r for r in group["ranks"] if isinstance(r, int))
            trace.groups[str(group.get("pg_name"))] = (str(group.get("pg_desc", "")), ranks)
    trace.stated = isinstance(rank, int) and rank >= 0
    if isinstance(rank, int) and rank >= 0:
        trace.rank = rank
    else:
        _rank_by_name(trace)
    trace.world = world if isinstance(world, int) else 0
    for d in _value(meta, "deviceProperties", list, []):
        if isinstance(d, dict) and isinstance(d.get("id"), int):
            memory = d.get("totalGlobalMem")
            trace.devices[d["id"]] = (str(d.get("name", "")), memory if isinstance(memory, int) else 0)
    name_device(trace)


def _rank_by_name(trace: RankTrace) -> None:
    """For a file that does not say its rank: the last number that its name calls one, or its folder's; else -1."""
    found = _RANK_IN_NAME.findall(trace.path.name) or _RANK_IN_NAME.findall(trace.path.parent.name)
    trace.rank = int(found[-1]) if found else -1
    trace.said["assumed: no rank in the file; " + ("taken from its name" if found else "numbered by order")] += 1


def name_device(trace: RankTrace) -> None:
    """Name and memory of the device that the activities are of."""
    used = int(trace.device.device[0]) if len(trace.device) else -1
    only = next(iter(trace.devices.values())) if len(trace.devices) == 1 else ("", 0)
    trace.device_name, trace.device_memory = trace.devices.get(used, only)


T = TypeVar("T")


def _value(meta: Meta, key: str, kind: type[T], default: T) -> T:
    raw = meta.get(key)
    if raw is None:
        return default
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return default
