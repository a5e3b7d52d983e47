"""Where the events are in a trace file: header, array of events in chunks, tail, in whatever key order.

A chunk is cut at the last ``}, {`` of the buffer. Nothing is assumed about layout or key order: a cut is
right exactly when the chunk decodes, and where it does not a string-aware scanner finds the ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import msgspec

from trainsys.errors import UserError
from trainsys.profiler.trace.decode import EventDecoder, mend, resync, separate
from trainsys.profiler.trace.events import AnyEvent
from trainsys.profiler.trace.source import Source

CHUNK = 1 << 18
_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
_AFTER = re.compile(rb'\s*(?:,\s*"|\}|\]?\s*$)')
_CLOSE = ord("]")
_SKIP = re.compile(rb"[\s,]*")

Meta = dict[str, msgspec.Raw]


class Splitter:
    """Iterates over lists of events; ``meta`` holds the top-level keys around them once exhausted."""

    def __init__(self, source: Source, *, keep_truncated: bool = False) -> None:
        self.source, self.keep_truncated = source, keep_truncated
        self.decoder = EventDecoder()
        self.meta: Meta = {}
        self.n_events = 0

    @property
    def said(self) -> Counter[str]:
        return self.decoder.said

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.source.path}: {what} at byte {self.source.offset} of the JSON text")

    def __iter__(self) -> Iterator[list[AnyEvent]]:
        pieces = iter(self.source)
        text, bare_array = self._header(pieces)
        ended = False
        while True:
            if ended:
                buffer = bytearray(b"[" + text)
            else:
                buffer, ended = self._fill(text, pieces)
            before = len(buffer) - 1
            events, text, closed = self._take(buffer, ended)
            if events:
                self.n_events += len(events)
                yield events
            if closed:
                self._tail(text, pieces)
                return
            if ended and len(text) == before:
                if bare_array and not text.strip(b" \t\r\n,"):
                    return  # the Chrome format lets a bare array go unclosed
                self._truncated()
                return

    def _truncated(self) -> None:
        if not self.keep_truncated:
            raise self._error(
                f"the JSON is cut off after {self.n_events} whole events (keep_truncated reads those)"
            )
        self.said["truncated: the file ends inside the events"] += 1

    def _fill(self, rest: bytes, pieces: Iterator[bytes]) -> tuple[bytearray, bool]:
        """A bracket, ``rest`` and the next pieces: joined once, and decoded where they then lie."""
        parts, size = [b"[", rest], len(rest)
        # A buffer larger than a chunk holds one giant event: double it, or reading is quadratic.
        want = max(CHUNK, 2 * size)
        if size > self.source.limits.unit_bytes:
            raise self._error(f"one event is larger than {self.source.limits.unit_bytes} bytes,")
        try:
            for piece in pieces:
                parts.append(piece)
                size += len(piece)
                if size >= want:
                    return bytearray().join(parts), False
        except UserError:
            if not self.keep_truncated:
                raise
        return bytearray().join(parts), True

    def _header(self, pieces: Iterator[bytes]) -> tuple[bytes, bool]:
        """Read up to the first event. Returns (text from there, whether the file is a bare array)."""
        buffer, searched = b"", 0
        for piece in pieces:
            buffer += piece
            if searched == 0 and buffer.lstrip()[:1] == b"[":
                return buffer.lstrip()[1:], True
            for found in _EVENTS.finditer(buffer, searched):
                if self._is_top_level(buffer[: found.start()]):
                    return buffer[found.end() :], False
            searched = max(1, len(buffer) - 64)
            if len(buffer) > self.source.limits.unit_bytes:
                raise self._error(
                    f"no traceEvents in the first {self.source.limits.unit_bytes} bytes, stopped"
                )
        raise self._error("no traceEvents array: not a profiler trace, or cut off before its events,")

    def _is_top_level(self, before: bytes) -> bool:
        """Whether what stands before the key is an object cut at its outermost level; keeps its keys if so."""
        closed = before.rstrip().rstrip(b",") + b"}"
        said: Counter[str] = Counter()
        for text in (closed, None):
            try:
                self.meta.update(msgspec.json.decode(mend(closed, said) if text is None else text, type=Meta))
                self.said.update(said)
                return True
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
        return False

    def _take(self, buffer: bytearray, ended: bool) -> tuple[list[AnyEvent], bytes, bool]:
        """Decode what is whole after the buffer's bracket. Returns (events, what is left, whether the array closed)."""
        cut = _last_boundary(buffer)
        if cut is not None:
            end, begin = cut
            comma, buffer[end] = buffer[end], _CLOSE
            events = self.decoder.try_fast(memoryview(buffer)[: end + 1])
            if events is not None:
                return events, bytes(memoryview(buffer)[begin:]), False
            buffer[end] = comma
        text = bytes(memoryview(buffer)[1:])
        found = separate(text)
        if found.close is not None and not _AFTER.match(text, found.close + 1):
            # A quote is missing somewhere before, and brackets inside strings were counted.
            found.damaged = True
        events = self._decode(found.objects)
        if found.damaged or (found.close is None and not found.objects and (ended or len(text) > 2 * CHUNK)):
            again = resync(text, found.end + 1)
            if again is not None:
                self.said["dropped: damaged stretch of events"] += 1
                return events, text[again:], False
            if found.damaged and not ended:
                return events, text[found.end :], False  # the next event is not in the buffer yet
        if found.close is not None:
            return events, text[found.close + 1 :], True
        return events, _SKIP.sub(b"", text[found.end :], count=1), False

    def _decode(self, objects: list[bytes]) -> list[AnyEvent]:
        events = self.decoder.try_fast(b"[" + b",".join(objects) + b"]")
        return self.decoder.slow(objects) if events is None else events

    def _tail(self, buffer: bytes, pieces: Iterator[bytes]) -> None:
        """The keys after the events. A damaged tail is said, never fatal: the events are whole."""
        parts, size = [buffer], len(buffer)
        for piece in pieces:
            parts.append(piece)
            size += len(piece)
            if size > self.source.limits.unit_bytes:
                self.said["ignored: oversized tail after the events"] += 1
                return
        text = b"".join(parts).strip()
        if text in (b"", b"}", b";"):
            return
        text = b"{" + text.lstrip(b", \t\r\n")
        for attempt in (text, mend(text, Counter())):
            try:
                self.meta.update(msgspec.json.decode(attempt, type=Meta))
                return
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
        if b"}" not in text:
            self._truncated()
        else:
            self.said["ignored: damaged text after the events"] += 1


def _last_boundary(buffer: bytearray) -> tuple[int, int] | None:
    """(end of an event, start of the next) of the last ``}, {`` in the buffer."""
    at = len(buffer)
    for _ in range(64):
        at = buffer.rfind(b"}", 0, at)
        if at < 0:
            return None
        found = _BETWEEN.match(buffer, at)
        if found:
            return at + 1, found.end()
    return None
