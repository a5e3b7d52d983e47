"""The records of a block under way, as JSON lines in a file of their own beside the rank's.

Its first line says after which byte of the rank's file they belong. The block that replaces them is appended there before
the tail is emptied: a reader that finds a whole block at that byte ignores the tail, and one that does not reads the
tail. So there is no moment at which a killed process has lost what it had written.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from trainsys.telemetry import block

MOST = 1 << 28
"""Bytes that are read of a tail; a writer's has a thousandth of that."""


class _Head(msgspec.Struct, tag="tail", tag_field="event"):
    after: int


_head = msgspec.json.Decoder(_Head)


def path_of(file: str | Path) -> Path:
    """``rank_00000.jsonl`` has ``rank_00000.tail``."""
    return Path(file).with_suffix(".tail")


class Tail:
    """The writer's side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._size = 0

    def write(self, lines: bytes, after: int) -> None:
        """Appends whole lines, which belong after byte ``after`` of the rank's file, or none. Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
        data = lines if self._size else msgspec.json.encode(_Head(after)) + b"\n" + lines
        try:
            write_all(self._fd, data)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def clear(self) -> None:
        """Its records are in the rank's file."""
        if self._size:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)


def write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def read(file: str | Path) -> tuple[int, bytes] | None:
    """After which byte of the rank's file the tail belongs, and its lines; None where there is no tail, or where the
    rank's file has them already. To be called before that is read."""
    try:
        with open(path_of(file), "rb") as lines:
            after = _head.decode(lines.readline(200)).after
            rest = lines.read(MOST)
    except (OSError, msgspec.DecodeError):
        return None
    try:
        with open(file, "rb") as whole:
            whole.seek(max(0, after))
            if block.of_line(whole.readline(block.MOST_BYTES)) is not None:
                return None
    except OSError:
        return None
    return after, rest
