"""Token shards: a corpus as memory-mapped files that say what they hold and notice damage.

One file, little-endian::

    header   64 B   magic, version, item size, tokens, documents, largest id, block size, meta size,
                    crc32 of the tail, crc32 of the header
    tokens          uint16 or uint32, each document ending with its end-of-text token; zero-padded to 8
    bytes tail            document starts + the end (uint64 x documents+1), crc32 of each token block
    (uint32), meta (JSON)

Opening checks the header, the file's size and the tail; ``verify`` also reads every token.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainsys.data.tokenizer import Tokenizer
from trainsys.errors import UserError

FORMAT_VERSION = 1
SUFFIX = ".tok"
INDEX = "index.json"
_MAGIC = b"TSYSTOK\0"
_HEADER = struct.Struct("<8sIIQQQIII8x")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """An opened shard; ``tokens[n_tokens]`` and ``doc_offsets[n_docs+1]`` map the file."""

    path: Path
    tokens: NDArray[Any]
    doc_offsets: NDArray[np.uint64]
    block_crcs: NDArray[np.uint32]
    max_token: int
    meta: dict[str, Any]
    header: bytes

    def verify(self) -> None:
        """Read every token; ``UserError`` names the damaged block. The tail was checked on opening."""
        payload = self.tokens.view(np.uint8)
        for i, expected in enumerate(self.block_crcs):
            if zlib.crc32(payload[i * _BLOCK_BYTES : (i + 1) * _BLOCK_BYTES].data) != expected:
                at = _HEADER_BYTES + i * _BLOCK_BYTES
                raise UserError(f"{self.path}: corrupt: token block {i} at byte {at} fails its checksum")


class ShardWriter:
    """Writes documents into ``shard_00000.tok``, … of about ``shard_tokens`` tokens.

    A document is never split. Files are synced to disk as they are finished. The folder's ``index.json``,
    written last, lists them.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int = 100_000_000) -> None:
        assert shard_tokens > 0
        self.folder = folder
        self.documents = 0
        self.tokens = 0
        self._eos = tokenizer.eos
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._meta = {
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "pad": tokenizer.pad,
        }
        self._limit = shard_tokens
        self._done: list[dict[str, Any]] = []
        self._open: _ShardFile | None = None

    def add(self, ids: NDArray[np.uint32]) -> None:
        """Append one document and its end-of-text token; an empty document is dropped."""
        if ids.size == 0:
            return
        if self._open is None:
            self._open = _ShardFile(self.folder / f"shard_{len(self._done):05d}{SUFFIX}", self._dtype)
        self._open.add(np.append(ids, self._eos).astype(self._dtype))
        self.documents += 1
        self.tokens += ids.size + 1
        if self._open.offsets[-1] >= self._limit:
            self._finish_shard()

    def close(self) -> None:
        if self._open is not None:
            self._finish_shard()
        index = {
            "version": FORMAT_VERSION,
            "documents": self.documents,
            "tokens": self.tokens,
            "shards": self._done,
        }
        with open(self.folder / INDEX, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.file.close()

    def _finish_shard(self) -> None:
        assert self._open is not None
        self._open.finish(self._meta)
        self._done.append({"name": self._open.path.name, "tokens": self._open.offsets[-1]})
        self._open = None


class _ShardFile:
    """One shard being written, in a single pass: the header is filled in at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.offsets = [0]
        self.file = open(path, "wb")  # noqa: SIM115 - lives as long as this object
        self.file.write(bytes(_HEADER_BYTES))
        self._dtype = dtype
        self._buffer = bytearray()
        self._crcs: list[int] = []
        self._max = 0

    def add(self, ids: NDArray[Any]) -> None:
        self.offsets.append(self.offsets[-1] + ids.size)
        self._max = max(self._max, int(ids.max()))
        self._buffer += ids.tobytes()
        while len(self._buffer) >= _BLOCK_BYTES:
            self._flush(_BLOCK_BYTES)

    def finish(self, meta: dict[str, Any]) -> None:
        if self._buffer:
            self._flush(len(self._buffer))
        n_tokens = self.offsets[-1]
        self.file.write(bytes(-n_tokens * self._dtype.itemsize % 8))
        encoded = json.dumps(meta).encode()
        tail = np.array(self.offsets, "<u8").tobytes() + np.array(self._crcs, "<u4").tobytes() + encoded
        self.file.write(tail)
        header = _HEADER.pack(
            _MAGIC, FORMAT_VERSION, self._dtype.itemsize, n_tokens, len(self.offsets) - 1, self._max,
            _BLOCK_BYTES, len(encoded), zlib.crc32(tail),
        )  # fmt: skip
        self.file.seek(0)
        self.file.write(header + _CRC.pack(zlib.crc32(header)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _flush(self, count: int) -> None:
        block = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._crcs.append(zlib.crc32(block))
        self.file.write(block)


def open_shard(path: Path) -> Shard:
    """Map a shard. ``UserError`` names the file and what is wrong: version, truncated, corrupt, no shard."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{path}: cannot open token shard: {error.strerror}") from error
    if head[: len(_MAGIC)] != _MAGIC:
        raise UserError(
            f"{path}: not a trainsys token shard (wrong magic); make one with 'trainsys data prepare'"
        )
    if len(head) < _HEADER_BYTES:
        raise UserError(f"{path}: truncated: {size} bytes, the header alone has {_HEADER_BYTES}")
    _, version, itemsize, n_tokens, n_docs, max_token, block, meta_bytes, tail_crc = _HEADER.unpack_from(head)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: shard format version {version}, this trainsys reads {FORMAT_VERSION}; prepare it again"
        )
    if _CRC.unpack_from(head, _HEADER.size)[0] != zlib.crc32(head[: _HEADER.size]):
        raise UserError(f"{path}: corrupt: the header fails its checksum; prepare it again")
    assert block == _BLOCK_BYTES, "version 1 has one block size"
    payload = n_tokens * itemsize
    n_blocks = -(-payload // block)
    tail_at = _HEADER_BYTES + payload + -payload % 8
    expected = tail_at + 8 * (n_docs + 1) + 4 * n_blocks + meta_bytes
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header says"
        raise UserError(f"{path}: {kind}: {size} bytes, expected {expected}; copy or prepare it again")
    if not n_tokens:
        raise UserError(f"{path}: holds no tokens")
    data = np.memmap(path, np.uint8, "r")
    if zlib.crc32(data[tail_at:].data) != tail_crc:
        raise UserError(
            f"{path}: corrupt: document index at byte {tail_at} fails its checksum; prepare it again"
        )
    crcs_at = tail_at + 8 * (n_docs + 1)
    return Shard(
        path=path,
        tokens=data[_HEADER_BYTES : _HEADER_BYTES + payload].view(f"<u{itemsize}"),
        doc_offsets=data[tail_at:crcs_at].view("<u8"),
        block_crcs=data[crcs_at : crcs_at + 4 * n_blocks].view("<u4"),
        max_token=max_token,
        meta=json.loads(bytes(data[expected - meta_bytes :])),
        header=head,
    )


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """Open shards that belong together; ``UserError`` where two were made with different tokenizers."""
    shards = [open_shard(path) for path in paths]
    for shard in shards:
        if shard.meta != shards[0].meta:
            raise UserError(
                f"{shard.path}: made with tokenizer {shard.meta['tokenizer']}, but {shards[0].path} with "
                f"{shards[0].meta['tokenizer']}; prepare both with one tokenizer"
            )
    return shards


def shard_fingerprint(shards: Sequence[Shard]) -> str:
    """Identity of the tokens, wherever they lie: headers carry the crc32 of the tokens' checksums."""
    return hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder: those its ``index.json`` names, else every ``*.tok`` in name order."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob(f"*{SUFFIX}"))
    try:
        names = [entry["name"] for entry in json.loads(index.read_text("utf-8"))["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a shard index ({error}); prepare the folder again") from error
    return [folder / name for name in names]
