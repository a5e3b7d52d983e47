"""Reading event files back, whatever state the run left them in."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import get_args

import msgspec

from trainsys.errors import UserError
from trainsys.telemetry import block, tail
from trainsys.telemetry.events import SCHEMA, SCHEMA_MAJOR, AnyEvent, RunStart
from trainsys.telemetry.records import Gathering, NoColumns, Records

MAX_LINE = 1 << 24
"""Bytes. No record or block comes near it: a longer "line" is damage, and is skipped without being held in memory."""
BATCH = 512
"""Records given as columns at a time, where they are lines."""

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
    """All usable records of one rank's file and its tail, in order, and what was wrong with the rest.

    Raises ``UserError`` only for a file whose schema major version is newer than this program's.
    """
    damage = Damage()
    return list(iter_events(path, damage)), damage


def iter_events(path: str | Path, damage: Damage) -> Iterator[AnyEvent]:
    """``read_events`` one record at a time; ``damage`` is filled while reading. A missing file yields
    nothing."""
    for source in _sources(path, damage):
        for _, found in source.entries(damage):
            if not isinstance(found, Records):
                yield found
                continue
            for event in found.events():
                if event is None:
                    damage.unknown += 1
                else:
                    yield event


@dataclass(frozen=True)
class Place:
    """Where some records of one rank are."""

    path: Path
    at: int
    length: int
    lines: bytes | None = None
    """Themselves, compressed, where they are in a tail: that may be gone when they are wanted again."""

    def read(self) -> Records:
        """The records, once more."""
        if self.lines is not None:
            data = zlib.decompress(self.lines)
        else:
            with open(self.path, "rb") as file:
                file.seek(self.at)
                data = file.read(self.length)
        batch = Gathering()
        for _, found in _Source(self.path, BytesIO(data).readline).entries(Damage()):
            if isinstance(found, Records):
                return found
            _add(batch, found)
        return batch.records()


def iter_parts(path: str | Path, damage: Damage) -> Iterator[tuple[Records, Place]]:
    """The same as columns, some hundred records at a time: a block, or as many lines."""
    for source in _sources(path, damage):
        batch, began, ended = Gathering(), 0, 0
        for at, found in source.entries(damage):
            if len(batch) and (isinstance(found, Records) or len(batch) == BATCH):
                yield batch.records(), source.place(began, ended)
                batch, began = Gathering(), ended
            ended = at
            if isinstance(found, Records):
                yield found, source.place(began, ended)
                began = ended
            elif not _add(batch, found):
                damage.damaged += 1
        if len(batch):
            yield batch.records(), source.place(began, ended)


def _add(batch: Gathering, event: AnyEvent) -> bool:
    try:
        batch.add(msgspec.to_builtins(event))
    except NoColumns:
        return False
    return True


def _sources(path: str | Path, damage: Damage) -> Iterator[_Source]:
    """The rank's file as far as its tail, and the tail."""
    damage.path = str(path)
    left = tail.read(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - entered below, where a failed open is not caught
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        damage.missing = True
        return
    with file:
        yield _Source(Path(path), file.readline, sys.maxsize if left is None else left[0])
    if left is not None:
        yield _Source(Path(path), BytesIO(left[1]).readline, sys.maxsize, left[1])


@dataclass(frozen=True)
class _Source:
    """Lines, and what they hold."""

    path: Path
    readline: Callable[[int], bytes]
    length: int = sys.maxsize
    tail: bytes | None = None

    def place(self, began: int, ended: int) -> Place:
        lines = None if self.tail is None else zlib.compress(self.tail[began:ended], 1)
        return Place(self.path, began, ended - began, lines)

    def entries(self, damage: Damage) -> Iterator[tuple[int, AnyEvent | Records]]:
        """What each line holds, and where it ends."""
        for ended, line, whole in self._lines():
            found = None if line is None else _decode(line, self.path)
            if not (found is None or isinstance(found, bool)):
                yield ended, found
            elif not whole:
                # A record may be whole although its newline is not: then nothing is lost.
                damage.truncated = True
            elif found is False:
                damage.unknown += 1
            elif line is None or line.strip():
                damage.damaged += 1

    def _lines(self) -> Iterator[tuple[int, bytes | None, bool]]:
        """(end, line, ends with a newline); None for a line that is over ``MAX_LINE``."""
        over, at = False, 0
        while chunk := self.readline(min(MAX_LINE, self.length - at)):
            at += len(chunk)
            whole = chunk.endswith(b"\n")
            if not whole and len(chunk) >= MAX_LINE:
                over = True
                continue
            yield at, (None if over else chunk), whole
            over = False
        if over:
            yield at, None, False


def _decode(line: bytes, path: str | Path) -> AnyEvent | Records | bool | None:
    """The record or block; False: a whole record of an unknown type; None: neither."""
    if line.startswith(block.MARK):
        return block.of_line(line)
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
