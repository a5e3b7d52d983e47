"""A file's bytes, gunzipped as they stream, with limits: flat memory whatever the file claims to be.

``isal`` decompresses 3-4x faster than zlib. Output is asked for in bounded pieces, so a gzip bomb costs
one piece of memory, and is refused once it is both large and implausibly well compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from isal import isal_zlib

from trainsys.errors import UserError

PIECE = 1 << 17
GZIP_MAGIC = b"\x1f\x8b"
SQLITE_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a hostile or broken file may cost.

    ``ratio``: decompressed over compressed bytes, looked at only past ``free_bytes``; real traces reach
    20-60, deflate's own maximum is 1032. ``total_bytes``: decompressed size of one file.
    ``unit_bytes``: largest single event, and largest header or tail around the events.
    """

    ratio: float = 300.0
    free_bytes: int = 256 << 20
    total_bytes: int = 256 << 30
    unit_bytes: int = 64 << 20


class Source:
    """Iterates over decompressed pieces of at most ``PIECE`` bytes; ``offset`` counts those given out."""

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.path, self.limits = path, limits or Limits()
        self.offset = 0
        """Decompressed bytes handed out so far."""
        self.raw_offset = 0
        """Bytes of the file itself read so far."""
        self.zipped = False

    def _error(self, what: str) -> UserError:
        at = f"byte {self.raw_offset} of the file"
        if self.zipped:
            at += f" (byte {self.offset} decompressed)"
        return UserError(f"{self.path}: {what} at {at}")

    def __iter__(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb", buffering=0) as file:
                first = file.read(PIECE)
                self.raw_offset = len(first)
                self.zipped = first[:2] == GZIP_MAGIC
                pieces = self._gunzip(first, file) if self.zipped else self._plain(first, file)
                for piece in pieces:
                    self.offset += len(piece)
                    if self.offset > self.limits.total_bytes:
                        raise self._error(
                            f"more than {self.limits.total_bytes} bytes; raise the limit to read it:"
                        )
                    yield piece
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _plain(self, piece: bytes, file: FileIO) -> Iterator[bytes]:
        while piece:
            yield piece
            piece = file.read(PIECE)
            self.raw_offset += len(piece)

    def _gunzip(self, data: bytes, file: FileIO) -> Iterator[bytes]:
        inflate = isal_zlib.decompressobj(wbits=31)
        while True:
            try:
                out = inflate.decompress(data, PIECE)
            except isal_zlib.error as error:  # type: ignore[misc]  # isal ships no types for it
                raise self._error(f"gzip data is damaged ({error})") from None
            if out:
                yield out
                produced, limits = self.offset, self.limits
                if produced > limits.free_bytes and produced > limits.ratio * self.raw_offset:
                    raise self._error(f"expands more than {limits.ratio:g} times: refused as a gzip bomb")
            if inflate.eof:
                data = inflate.unused_data or self._more(file)
                if not data.strip(b"\0"):
                    return
                if data[:2] != GZIP_MAGIC[: len(data)]:
                    raise self._error("data that is not gzip follows the gzip stream")
                inflate = isal_zlib.decompressobj(wbits=31)
                continue
            data = inflate.unconsumed_tail
            if not data:
                data = self._more(file)
                if not data and not out:
                    raise self._error("gzip stream is cut off: it ends")

    def _more(self, file: FileIO) -> bytes:
        data = file.read(PIECE)
        self.raw_offset += len(data)
        return data


def peek(path: Path, n: int = 4096) -> bytes:
    """The first ``n`` decompressed bytes (fewer in a short file). Raises UserError where there are none to get."""
    for piece in Source(path):
        return piece[:n]
    return b""


def read_all(path: Path, limit: int = 2 << 30) -> bytes:
    """A whole file, decompressed, refused past ``limit`` bytes: for small kinds (dumps, snapshots)."""
    return b"".join(Source(path, Limits(total_bytes=limit)))
