"""Free memory at the moment of a refusal: the allocator's state, replayed backwards from the snapshot.

The snapshot knows every segment and block at its end; undoing the history from there needs no record of when a
segment was mapped. A request can only use free blocks of its own stream, of the shared pool (the private pools of CUDA
graphs serve their graphs alone), and of segments for its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SMALL = 1 << 20
"""Requests up to this come from segments of their own."""
MAPPED, UNMAPPED = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")


@dataclass(frozen=True, slots=True)
class Segment:
    size: int
    stream: int
    private: bool
    small: bool
    expandable: bool


def segments_of(entries: list[dict[str, Any]]) -> dict[int, Segment]:
    """By address."""
    return {int(s["address"]): _segment(s, int(s["total_size"])) for s in entries}


def _segment(entry: dict[str, Any], size: int) -> Segment:
    pool = tuple(entry.get("segment_pool_id") or (0, 0))
    small = entry.get("segment_type") == "small"
    return Segment(size, int(entry.get("stream") or 0), any(pool), small, bool(entry.get("is_expandable")))


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that were free: ``usable`` for the request, stretch by stretch, and those ``elsewhere``."""

    usable: list[int]
    elsewhere: int
    expandable: bool
    """All of the usable ones lie in expandable segments."""


def refusals(
    events: list[dict[str, Any]], segments: dict[int, Segment], live: dict[int, int]
) -> Iterator[tuple[dict[str, Any], Free]]:
    """Each ``oom`` event with what was free then; the last one first. ``segments``, ``live``: at the snapshot."""
    segments, live = dict(segments), dict(live)
    for event in reversed(events):
        action, address, size = event.get("action"), int(event.get("addr", 0)), int(event.get("size", 0))
        if action == "oom":
            yield event, _free(event, segments, live)
        elif action in MAPPED:
            _cut(segments, address, size)
        elif action in UNMAPPED:
            segments[address] = _segment(event | {"is_expandable": action == "segment_unmap"}, size)
        elif action == "alloc":
            live.pop(address, None)
        elif action == "free_completed":
            live[address] = size


def _cut(segments: dict[int, Segment], address: int, size: int) -> None:
    """Undo a mapping: the whole segment, or the part of an expandable one that was mapped then."""
    for begin, s in segments.items():
        if begin <= address < begin + s.size:
            del segments[begin]
            for at, end in ((begin, address), (address + size, begin + s.size)):
                if end > at:
                    segments[at] = Segment(end - at, s.stream, s.private, s.small, s.expandable)
            return


def _free(event: dict[str, Any], segments: dict[int, Segment], live: dict[int, int]) -> Free:
    size, stream = int(event.get("size", 0)), int(event.get("stream") or 0)
    usable: list[int] = []
    elsewhere, expandable = 0, True
    for begin, end, s in _joined(segments):
        gaps = _gaps(begin, end, live)
        if s.private or s.stream != stream or (s.small and size > SMALL):
            elsewhere += sum(gaps)
        elif gaps:
            usable += gaps
            expandable &= s.expandable
    return Free(usable, elsewhere, expandable and bool(usable))


def _joined(segments: dict[int, Segment]) -> Iterator[tuple[int, int, Segment]]:
    """Neighbouring parts of an expandable segment are one stretch."""
    held: tuple[int, int, Segment] | None = None
    for begin in sorted(segments):
        s = segments[begin]
        alike = held is not None and (held[2].stream, held[2].private, held[2].small) == (
            s.stream,
            s.private,
            s.small,
        )
        if held is not None and alike and held[1] == begin:
            held = (held[0], begin + s.size, s)
            continue
        if held is not None:
            yield held
        held = (begin, begin + s.size, s)
    if held is not None:
        yield held


def _gaps(begin: int, end: int, live: dict[int, int]) -> list[int]:
    out, at = [], begin
    for address in sorted(a for a in live if begin <= a < end):
        if address > at:
            out.append(address - at)
        at = max(at, address + live[address])
    return [*out, end - at] if end > at else out
