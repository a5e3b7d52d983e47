"""JSON text of events to typed events: fast when it is right, repaired when it is not, counted either way.

The fast path is one msgspec decode of a whole chunk. It is also the check that the chunk was cut at an
event's end: a cut inside a string or a nested value cannot decode. What fails is taken apart with a
string-aware scanner and mended event by event; what cannot be mended is dropped and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec

from trainsys.profiler.trace.events import AnyEvent, Event, ExactEvent, by_category
from trainsys.profiler.trace.intervals import Ints

_FAST: msgspec.json.Decoder[Any] = msgspec.json.Decoder(list[Event])
_EXACT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(list[ExactEvent])
_LAX: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Event, strict=False)
_LAX_EXACT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(ExactEvent, strict=False)

_PATIENCE = 4
"""Chunks with events that have no category, or arguments not as typed: one at either end of a file is usual."""

# What PyTorch, Kineto and post-processing scripts were seen to get wrong, cheapest first.
_REPAIRS: tuple[tuple[str, re.Pattern[bytes], bytes], ...] = (
    ("missing value", re.compile(rb'("\s*:\s*)(?=[,}\]])'), rb"\1null"),
    (
        "NaN or Infinity",
        re.compile(rb"(?<=[:\[,\s])[-+]?(?:nan|inf(?:inity)?)\b(?=\s*[,}\]])", re.I),
        b"null",
    ),
    ("trailing comma", re.compile(rb",(\s*[}\]])"), rb"\1"),
    ("missing comma", re.compile(rb"\}(\s*)\{"), rb"},\1{"),
    ("bad escape", re.compile(rb'(?<!\\)((?:\\\\)*)\\(?![\\"/bfnrtu])'), rb"\1\\\\"),
)
# Possessive, and up to the end where a text is cut inside a string: of millions of escaped quotes each would else be a
# place to come back to, and then be tried as a string of its own, all the way to the end.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.S)
_CONTROL = re.compile(rb"[\x00-\x1f]")
# A run of plain characters at once: one step a character would need memory for each of a long name.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[\]{}]', re.S)
_RESYNC = re.compile(rb'\}\s*,\s*(?=\{\s*"(?:ph|name|cat|pid|tid|ts)"\s*:)')


def mend(text: bytes, said: Counter[str]) -> bytes:
    """Repair known damage; ``said`` counts each repair by what it was."""
    for what, pattern, by in _REPAIRS:
        text, n = pattern.subn(by, text)
        if n:
            said[f"repaired: {what}"] += n
    if _CONTROL.search(text):
        # Tabs and line ends between tokens are JSON, inside a string they are not.
        mended = _STRING.sub(lambda m: _CONTROL.sub(b" ", m[0]), text)
        mended = re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b" ", mended)
        said["repaired: control character in a string"] += mended != text
        text = mended
    try:
        text.decode()
    except UnicodeDecodeError:
        said["repaired: invalid UTF-8"] += 1
        text = text.decode("utf-8", "replace").encode()
    return text


class EventDecoder:
    """Decodes chunks of comma-separated events; ``said`` tells what was mended or dropped."""

    def __init__(self) -> None:
        self.said: Counter[str] = Counter()
        self.exact = False
        """Set once a double cannot hold the file's timestamps to the nanosecond."""
        self._mend_first = False
        self._known: frozenset[str] = frozenset()
        self._typed: msgspec.json.Decoder[Any] | None = None
        self._in_vain = 0

    def try_fast(self, chunk: memoryview | bytes) -> list[AnyEvent] | None:
        """The events of a chunk, brackets included; None if it is not whole events or not as typed."""
        if self._mend_first:
            return None
        try:
            if self.exact:
                return _EXACT.decode(chunk)  # type: ignore[no-any-return]
            if self._typed is not None:
                try:
                    return self._typed.decode(chunk)  # type: ignore[no-any-return]
                except msgspec.ValidationError:
                    pass
            events: list[AnyEvent] = _FAST.decode(chunk)
            if self._in_vain < _PATIENCE:
                self._learn(events)
            return events
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def _learn(self, events: list[AnyEvent]) -> None:
        """The categories that ``by_category`` did not know: from now on it does, or it is left."""
        new = {e.cat for e in events} - self._known
        self._known |= new
        self._in_vain += not new
        self._typed = by_category(self._known) if self._in_vain < _PATIENCE else None

    def slow(self, spans: list[bytes]) -> list[AnyEvent]:
        """Events from objects already separated by the scanner, mending and dropping one by one."""
        decoder = _EXACT if self.exact else _FAST
        said: Counter[str] = Counter()
        try:
            mended = mend(b",".join(spans), said)
            events = decoder.decode(b"[" + mended + b"]")
            self.said.update(said)
            # Damage comes in every chunk of such a file: skip the attempt that is bound to fail.
            self._mend_first = True
            return events  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        lax = _LAX_EXACT if self.exact else _LAX
        out: list[AnyEvent] = []
        waiting = spans[::-1]
        while waiting:
            span = waiting.pop()
            event = self._one(lax, span)
            if event is not None:
                out.append(event)
            elif (begin := resync(span, 1)) is not None:
                # A lost quote made one object of many: from the next event on it reads right again.
                waiting.extend(separate(span[begin:]).objects[::-1])
        return out

    def _one(self, lax: msgspec.json.Decoder[Any], span: bytes) -> AnyEvent | None:
        said: Counter[str] = Counter()
        for attempt in (span, None):
            try:
                event: AnyEvent = lax.decode(mend(span, said) if attempt is None else attempt)
                self.said.update(said)
                return event
            except msgspec.ValidationError:
                kind = "dropped: event with a field of the wrong type"
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                kind = "dropped: event that is not JSON"
        self.said[kind] += 1
        return None


DEEPEST = 500
"""Nesting past which text is taken for damage; the decoder gives up at about a thousand."""


@dataclass(slots=True)
class Separated:
    """Whole ``{...}`` objects from the begin of a text, and how far they go."""

    objects: list[bytes]
    end: int
    """After the last whole object."""
    close: int | None = None
    """Offset of the ``]`` that ends the array, if it is there."""
    damaged: bool = False
    """Brackets do not pair: a quote or a bracket is missing after ``end``."""


def separate(text: bytes) -> Separated:
    """Split text that begins at an array element, minding strings and the pairing of brackets."""
    out = Separated([], 0)
    opened = bytearray()
    begin = 0
    for token in _TOKEN.finditer(text):
        c = text[token.start()]
        if c == 0x7B or c == 0x5B:
            if not opened:
                begin = token.start()
            opened.append(c)
            if len(opened) > DEEPEST:
                out.damaged = True
                return out
        elif c == 0x7D or c == 0x5D:
            if not opened:
                out.close, out.damaged = token.start(), c == 0x7D
                return out
            if opened.pop() != c - 2:
                out.damaged = True
                return out
            if not opened:
                out.end = token.end()
                out.objects.append(text[begin : out.end])
    return out


def resync(text: bytes, begin: int) -> int | None:
    """Where the next event seems to begin after damage that hides the structure; None if nowhere."""
    found = _RESYNC.search(text, begin)
    return found.end() if found else None


_EXACT_US = 1 << 43


def to_ns(values: list[int | float] | list[Decimal], per_unit: int) -> Ints | None:
    """Times as written to int64 ns, exactly; None where a double has already lost nanoseconds.

    ``per_unit`` 1000 (the format's microseconds) or 1. Below 2^43 us a double is within 0.49 ns of what
    was written, so the nearest integer is right if whole and fraction are scaled apart; multiplying the
    double itself is not.
    """
    import numpy as np

    if values and isinstance(values[0], Decimal):
        return np.array([int((v * per_unit).to_integral_value()) for v in values], np.int64)
    raw = np.array(values)
    if raw.dtype.kind == "i":
        return np.asarray(raw * per_unit, np.int64)
    if raw.dtype.kind != "f":
        return np.array([int(v) * per_unit for v in values], np.int64)
    large = np.abs(raw) >= _EXACT_US
    if per_unit != 1 and bool(large.any()):
        # Even one that looks whole may have had decimals; integers among doubles have become doubles too.
        if any(isinstance(v, float) and abs(v) >= _EXACT_US for v in values):
            return None
        return np.array([_scaled(v, per_unit) for v in values], np.int64)
    whole = np.floor(raw)
    if per_unit == 1:
        return np.asarray(whole, np.int64)
    part = np.rint((raw - whole) * per_unit)
    return np.asarray(whole.astype(np.int64) * per_unit + part.astype(np.int64), np.int64)


def _scaled(value: int | float | Decimal, per_unit: int) -> int:
    if isinstance(value, float):
        whole = int(value // 1)
        return whole * per_unit + round((value - whole) * per_unit)
    return int(value) * per_unit
