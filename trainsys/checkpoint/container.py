"""One file of tensors, in the safetensors format (https://github.com/huggingface/safetensors, "Format").

8 bytes little-endian header length, a JSON header ``{key: {dtype, shape, data_offsets}}``, then the data. No
pickle, memory-mapped reads, and every tool that knows safetensors can look inside. The header is known before
the data, so a file is written in one pass and hashed while it is written. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from trainsys.checkpoint.durable import naming

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
CHUNK = 8 << 20
_MAX_HEADER = 100_000_000  # the format's own limit
_ALIGN = 64


class Damaged(Exception):
    """A file that is not what it should be; the message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file. ``offset`` is from the start of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def arrange(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[Entry]]:
    """The file's head (length and header), and the entries with their offsets, in the order of ``entries``.

    Order them by falling item size and every tensor is aligned to its item.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for e in entries:
        assert e.key not in header, f"{e.key} twice in one file"
        header[e.key] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    start = len(head)
    return head, [Entry(e.key, e.dtype, e.shape, start + header[e.key]["data_offsets"][0]) for e in entries]


def write_pieces(
    path: Path,
    pieces: Iterable[memoryview],
    stop: Callable[[], bool] = lambda: False,
    seen: Callable[[memoryview], object] = lambda chunk: None,
) -> None:
    """Write ``pieces`` one after the other and make the file durable.

    ``stop`` is asked before each chunk of 8 MiB; true ends the write with InterruptedError. ``seen`` is called with each.
    """
    # Unbuffered: chunks are large, and an error of the disk is then raised by the write that met it.
    with open(path, "wb", buffering=0) as file, naming(path):
        for piece in pieces:
            data = piece.cast("B")
            for start in range(0, len(data), CHUNK):
                if stop():
                    raise InterruptedError(f"{path}: the write was given up")
                chunk = data[start : start + CHUNK]
                seen(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]
                # The disk begins now rather than at fsync, and the page cache is left to the training data.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())


def write_file(
    path: Path, head: bytes, buffers: Iterable[memoryview], stop: Callable[[], bool] = lambda: False
) -> str:
    """:func:`write_pieces` of ``head`` and ``buffers``, hashed on the way; the sha256 (hex)."""
    digest = hashlib.sha256()
    write_pieces(path, chain((memoryview(head),), buffers), stop, digest.update)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a file (hex)."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class TensorFile:
    """A file opened for reading: ``entries`` by key, and their bytes through a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise Damaged(f"{path}: not a safetensors file, or cut short")
            try:
                header = json.loads(file.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                self.entries = {key: _entry(key, value, 8 + length) for key, value in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Damaged(f"{path}: header is damaged ({error})") from None
            end = max((e.offset + e.nbytes for e in self.entries.values()), default=8 + length)
            if end > size:
                raise Damaged(f"{path}: {size} bytes, but its header speaks of {end}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def data(self, key: str) -> memoryview:
        """The bytes of one tensor, row-major; read from the disk when touched."""
        e = self.entries[key]
        return memoryview(self._map)[e.offset : e.offset + e.nbytes]


def _entry(key: str, value: dict[str, Any], start: int) -> Entry:
    first, last = value["data_offsets"]
    entry = Entry(key, value["dtype"], tuple(value["shape"]), start + first)
    if entry.nbytes != last - first or first < 0 or min(entry.shape, default=0) < 0:
        raise ValueError(f"{key}: {entry.shape} {entry.dtype} in {last - first} bytes")
    return entry
