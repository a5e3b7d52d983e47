"""Megatron-LM's indexed dataset (``PREFIX.bin`` tokens, ``PREFIX.idx`` index), read as published in
``megatron/core/datasets/indexed_dataset.py``:

    9 B "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences, u64 length of the document index,
    i32 length of each sequence, i64 byte offset of each, i64 document index (first sequence of each document,
    and the end), and for multimodal data one i8 mode a sequence.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from trainsys.data.corpus import Corpus, Segment
from trainsys.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 4096
# Codes of integer types; 6 and 7 are floats, which are no tokens.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def open_megatron(prefix: str) -> Corpus:
    """Documents as the files hold them: no end-of-text token is added. ``UserError`` names the file and the
    fault."""
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    index, tokens = (Path(prefix + suffix).expanduser() for suffix in (".idx", ".bin"))
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; data.path for source megatron is the prefix of a .bin/.idx pair"
            )
    raw = index.read_bytes()
    if raw[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{index}: not a Megatron index (wrong magic)")
    if len(raw) < _HEADER.size:
        raise UserError(f"{index}: truncated: {len(raw)} bytes, the header alone has {_HEADER.size}")
    _, version, code, n_sequences, n_index = _HEADER.unpack_from(raw)
    if version != 1:
        raise UserError(f"{index}: index version {version}, trainsys reads 1")
    if code not in _DTYPES:
        raise UserError(
            f"{index}: dtype code {code} is not an integer type; readable codes: {sorted(_DTYPES)}"
        )
    expected = _HEADER.size + 12 * n_sequences + 8 * n_index
    if len(raw) not in (expected, expected + n_sequences):
        raise UserError(f"{index}: truncated or corrupt: {len(raw)} bytes, expected {expected}")
    at = _HEADER.size
    sizes = np.frombuffer(raw, "<i4", n_sequences, at)
    pointers = np.frombuffer(raw, "<i8", n_sequences, at + 4 * n_sequences)
    documents = np.frombuffer(raw, "<i8", n_index, at + 12 * n_sequences)

    dtype = np.dtype(_DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if (sizes < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise UserError(
            f"{index}: corrupt: sequences do not lie end to end in the .bin; merge the files again"
        )
    if n_index < 1 or documents[0] != 0 or documents[-1] != n_sequences or (np.diff(documents) < 0).any():
        raise UserError(
            f"{index}: corrupt: the document index does not rise from 0 to {n_sequences} sequences"
        )
    size, needed = tokens.stat().st_size, int(ends[-1]) * dtype.itemsize
    if size != needed:
        kind = "truncated" if size < needed else "longer than its index says"
        raise UserError(f"{tokens}: {kind}: {size} bytes, the index needs {needed}")
    if not needed:
        raise UserError(f"{tokens}: holds no tokens")
    record = {
        "source": "megatron",
        "path": prefix,
        "fingerprint": hashlib.sha256(raw).hexdigest(),
        "fingerprint_of": "the .idx file",
        "tokens_fingerprint": _fingerprint(raw, tokens, size),
    }
    # Empty documents would make two boundaries of one: dropped.
    offsets = np.unique(ends[documents])
    # The format names neither vocabulary nor padding id. Padding is masked in labels, so any id serves: 0.
    return Corpus(prefix, [Segment(np.memmap(tokens, dtype, "r"), offsets)], 0, None, record)


def _fingerprint(index: bytes, tokens: Path, size: int) -> str:
    """Hash of the whole index and of 256 blocks of 4 KiB spread over the tokens, which may be terabytes."""
    digest = hashlib.sha256(index)
    with open(tokens, "rb") as file:
        for at in sorted({max(0, size - _BLOCK) * i // 255 for i in range(256)}):
            file.seek(at)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
