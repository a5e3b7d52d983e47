"""Reading event files back, whatever state the run left them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import msgspec

from trainsys.errors import UserError
from trainsys.telemetry.events import SCHEMA, SCHEMA_MAJOR, AnyEvent, RunStart

MAX_LINE = 1 << 24
"""Bytes. No record comes near it: a longer "line" is damage, and is skipped without being held in memory."""

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class Damage(msgspec.Struct):
    """What could not be used of one file."""

    path: str = ""
    missing: bool = False
    damaged: int = 0
    """Lines that are not a record: bit rot, interleaved writes, wrong types."""
    truncated: bool = False
    """The last line has no end: the process was killed while writing it."""
    unknown: int = 0
    """Whole records of a type that this version does not know."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.damaged or self.truncated or self.unknown)

    def __str__(self) -> str:
        if self.missing:
            return f"{self.path}: missing"
        parts = []
        if self.damaged:
            parts.append(f"{self.damaged} damaged line{'s' * (self.damaged > 1)} skipped")
        if self.truncated:
            parts.append("last record cut short")
        if self.unknown:
            parts.append(f"{self.unknown} record{'s' * (self.unknown > 1)} of a newer version skipped")
        return f"{self.path}: {', '.join(parts) or 'whole'}"


class _Head(msgspec.Struct):
    """The least that any version's line holds."""

    event: str
    schema: str = ""


_head_decoder = msgspec.json.Decoder(_Head)
_known = {t.__struct_config__.tag for t in get_args(AnyEvent)}


def read_events(path: str | Path) -> tuple[list[AnyEvent], Damage]:
    """All usable records of one file, in order, and what was wrong with the rest.

    Raises ``UserError`` only for a file whose schema major version is newer than this program's.
    """
    damage = Damage()
    return list(iter_events(path, damage)), damage


def iter_events(path: str | Path, damage: Damage) -> Iterator[AnyEvent]:
    """``read_events`` one record at a time; ``damage`` is filled while reading. A missing file yields
    nothing."""
    damage.path = str(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - entered below, where a failed open is not caught
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        damage.missing = True
        return
    with file:
        for line, whole in _lines(file.readline):
            if not whole:
                # A record may be whole although its newline is not: then nothing is lost.
                event = None if line is None else _decode(line, path)
                if isinstance(event, msgspec.Struct):
                    yield event
                else:
                    damage.truncated = True
                return
            event = None if line is None else _decode(line, path)
            if isinstance(event, msgspec.Struct):
                yield event
            elif event is False:
                damage.unknown += 1
            elif line is None or line.strip():
                damage.damaged += 1


def _lines(readline: Callable[[int], bytes]) -> Iterator[tuple[bytes | None, bool]]:
    """(line, ends with a newline); None for a line that is over ``MAX_LINE``."""
    over = False
    while chunk := readline(MAX_LINE):
        whole = chunk.endswith(b"\n")
        if not whole and len(chunk) >= MAX_LINE:
            over = True
            continue
        yield (None if over else chunk), whole
        over = False
    if over:
        yield None, False


def _decode(line: bytes, path: str | Path) -> AnyEvent | bool | None:
    """The record; False: a whole record of an unknown type; None: not a record."""
    try:
        event = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            head = _head_decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if head.event == "run_start":
            _check_schema(head.schema, path)
        return None if head.event in _known else False
    if isinstance(event, RunStart):
        _check_schema(event.schema, path)
    return event


def _check_schema(schema: str, path: str | Path) -> None:
    major = schema.partition(".")[0]
    if major.isdecimal() and int(major) > SCHEMA_MAJOR:
        raise UserError(
            f"{path}: written with event schema {schema}, this trainsys reads up to {SCHEMA}: "
            "read it with the trainsys that wrote it, or a newer one"
        )


def event_file(run_dir: str | Path, rank: int) -> Path:
    """Where a rank of a run writes its events."""
    return Path(run_dir) / "events" / f"rank_{rank:05d}.jsonl"
