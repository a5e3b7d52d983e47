"""The allocator's state and its history, replayed backwards to the peak."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainsys.errors import UserError
from trainsys.profiler.memory_snapshot.leaks import find_leaks
from trainsys.profiler.memory_snapshot.pools import MAPPED, UNMAPPED, refusals, segments_of
from trainsys.profiler.memory_snapshot.report import Holder, MemoryReport, OutOfMemory
from trainsys.profiler.memory_snapshot.stacks import Stacks
from trainsys.profiler.safe_pickle import load_plain

POINTS = 600
_ALLOC, _FREE = "alloc", "free_completed"
_PENDING = ("active_pending_free", "active_awaiting_free")
_EACH = 128


def is_snapshot(content: Any) -> bool:
    return (
        isinstance(content, dict) and isinstance(content.get("segments"), list) and "device_traces" in content
    )


def analyse_snapshot(path: Path, content: Any = None) -> list[MemoryReport]:
    """One report for each device with memory in the snapshot.

    ``content``: the file's plain data if already loaded. Raises UserError if it is not a snapshot or its
    fields are not what an allocator writes.
    """
    content = load_plain(path) if content is None else content
    if not is_snapshot(content):
        raise UserError(f"{path}: not an allocator snapshot: no 'segments' and 'device_traces'")
    try:
        devices = sorted({int(s["device"]) for s in content["segments"]})
        return [_device(path, content, d) for d in devices]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: not an allocator snapshot: a field is missing or wrong ({error!r})"
        ) from None


def _device(path: Path, content: dict[str, Any], device: int) -> MemoryReport:
    segments = [s for s in content["segments"] if int(s["device"]) == device]
    traces = content["device_traces"]
    events = [e for e in (traces[device] if device < len(traces) else []) if isinstance(e, dict)]
    active = {
        int(b["address"]): (int(b["size"]), b.get("frames"))
        for b in _blocks(segments)
        if b["state"] != "inactive"
    }
    requested = sum(
        int(b.get("requested_size", b["size"])) for b in _blocks(segments) if b["state"] != "inactive"
    )
    free = [int(b["size"]) for b in _blocks(segments) if b["state"] == "inactive"]
    reserved = sum(int(s["total_size"]) for s in segments)
    in_use = sum(size for size, _ in active.values())
    curve, held = _curves(events, in_use, reserved)
    top = int(np.argmax(curve)) if curve.size else 0
    peak = int(curve[top]) if curve.size else in_use
    stacks, said = Stacks(), Counter[str]()
    holders = _holders_at(events, active, top, stacks)
    by_part, by_module, rows = _group(holders, peak, said)
    biggest = max((int(e["size"]) for e in events if e.get("action") == _ALLOC), default=0)
    times = np.array([int(e.get("time_us", 0)) for e in events], np.int64)
    first = int(times[0]) if times.size else 0
    return MemoryReport(
        str(path),
        device,
        reserved,
        in_use,
        reserved - in_use,
        max(0, in_use - requested),
        len(segments),
        max(free, default=0),
        round(1 - max(free) / sum(free), 4) if sum(free) else 0.0,
        peak,
        int(times[top - 1]) - first if top else 0,
        rows,
        by_part,
        by_module,
        _timeline(curve, held, times - first),
        _failures(events, segments, stacks),
        biggest,
        biggest <= max(free, default=0),
        sum(int(b["size"]) for b in _blocks(segments) if b["state"] in _PENDING),
        sum(s.size for s in segments_of(segments).values() if s.private),
        find_leaks(events, stacks, peak),
        dict(said),
    )


def _blocks(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [b for s in segments for b in s["blocks"]]


def _curves(
    events: list[dict[str, Any]], active: int, reserved: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Active and reserved bytes before the first event and after each; the last values are the snapshot's own."""
    if not events:
        return np.array([active]), np.array([reserved])
    change = np.array(
        [_sign(e.get("action"), _ALLOC, _FREE) * int(e.get("size", 0)) for e in events], np.int64
    )
    mapped = np.array(
        [_sign(e.get("action"), MAPPED, UNMAPPED) * int(e.get("size", 0)) for e in events], np.int64
    )

    def back(change: np.ndarray[Any, Any], last: int) -> np.ndarray[Any, Any]:
        return np.asarray(np.concatenate([[0], np.cumsum(change)]) + last - change.sum())

    return back(change, active), back(mapped, reserved)


def _sign(action: Any, plus: str | tuple[str, ...], minus: str | tuple[str, ...]) -> int:
    if action == plus or (isinstance(plus, tuple) and action in plus):
        return 1
    return -1 if action == minus or (isinstance(minus, tuple) and action in minus) else 0


def _holders_at(
    events: list[dict[str, Any]], active: dict[int, tuple[int, Any]], top: int, stacks: Stacks
) -> list[tuple[int, tuple[str, str, str]]]:
    """(bytes, named stack) of each block alive just after event number ``top``, by undoing what came later."""
    live = dict(active)
    for event in reversed(events[top:]):
        action, address = event.get("action"), int(event.get("addr", 0))
        if action == _ALLOC:
            live.pop(address, None)
        elif action == _FREE:
            # Who allocated it is recorded at its own alloc event, if that is in the history.
            live[address] = (int(event["size"]), None)
    born: dict[int, int] = {}
    for i, event in enumerate(events[:top]):
        address = int(event.get("addr", 0))
        if event.get("action") == _ALLOC and address in live and int(event["size"]) == live[address][0]:
            live[address] = (live[address][0], event.get("frames"))
            born[address] = i
    oldest_first = sorted(live, key=lambda address: (born.get(address, -1), address))
    return [(live[address][0], stacks.name(live[address][1])) for address in oldest_first]


def _group(
    holders: list[tuple[int, tuple[str, str, str]]], peak: int, said: Counter[str]
) -> tuple[dict[str, int], dict[str, int], list[Holder]]:
    parts: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    rows: dict[tuple[str, str, str], list[int]] = {}
    for size, (where, module, part) in holders:
        parts[part] += size
        modules[module] += size
        rows.setdefault((where, module, part), []).append(size)
    gap = peak - sum(parts.values())
    if gap:
        parts["not attributed"] += gap
        said["bytes at the peak without a block in the history"] += abs(gap)
    top = sorted(rows.items(), key=lambda r: -sum(r[1]))[:40]
    return (
        dict(parts.most_common()),
        dict(modules.most_common(30)),
        [Holder(w, m, p, sum(sizes), len(sizes), sizes[:_EACH]) for (w, m, p), sizes in top],
    )


def _timeline(
    active: np.ndarray[Any, Any], reserved: np.ndarray[Any, Any], times: np.ndarray[Any, Any]
) -> list[tuple[int, int, int]]:
    """At most POINTS points; in each bin the instant of the highest active bytes, so that no peak is lost."""
    at = np.concatenate([[0], times])
    n = active.size
    edges = np.unique(np.linspace(0, n, min(n, POINTS) + 1).astype(int))
    keep = [lo + int(np.argmax(active[lo:hi])) for lo, hi in pairwise(edges.tolist())]
    return [(int(at[i]), int(active[i]), int(reserved[i])) for i in keep]


def _failures(
    events: list[dict[str, Any]], segments: list[dict[str, Any]], stacks: Stacks
) -> list[OutOfMemory]:
    """Refused requests, in order, against what was free at that moment."""
    live = {int(b["address"]): int(b["size"]) for b in _blocks(segments) if b["state"] != "inactive"}
    out = []
    for event, free in refusals(events, segments_of(segments), live):
        size, on_device, total = (
            int(event.get("size", 0)),
            int(event.get("device_free") or 0),
            sum(free.usable),
        )
        out.append(
            OutOfMemory(
                size,
                on_device,
                max(free.usable, default=0),
                total,
                size <= total + on_device,
                stacks.name(event.get("frames"))[0],
                free.elsewhere,
                free.expandable,
            )
        )
    return out[::-1]
