from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainsys.data.megatron import open_megatron
from trainsys.data.source import build_source
from trainsys.errors import UserError

DOCS = [[[1, 2, 3]], [[4, 5], [6]], [[7, 8, 9, 10]]]  # the second document has two sequences
FLAT = [t for doc in DOCS for sequence in doc for t in sequence]


def write_megatron(prefix: Path, code: int = 8, dtype: str = "<u2", modes: bool = False) -> Path:
    """As megatron/core/datasets/indexed_dataset.py documents the format."""
    sequences = [s for doc in DOCS for s in doc]
    sizes = np.array([len(s) for s in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * np.dtype(dtype).itemsize
    documents = np.cumsum([0, *[len(doc) for doc in DOCS]]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(documents))
    tail = np.zeros(len(sizes), np.int8).tobytes() if modes else b""
    prefix.with_suffix(".idx").write_bytes(
        header + sizes.tobytes() + pointers.tobytes() + documents.tobytes() + tail
    )
    prefix.with_suffix(".bin").write_bytes(np.array(FLAT, dtype).tobytes())
    return prefix


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
@pytest.mark.parametrize("modes", [False, True])
def test_reads_what_the_format_says(tmp_path: Path, code: int, dtype: str, modes: bool) -> None:
    prefix = write_megatron(tmp_path / "corpus", code, dtype, modes)
    for name in (prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx")):
        corpus = open_megatron(str(name))
        assert corpus.read(0, corpus.n_tokens).tolist() == FLAT
        assert [corpus.doc_span(d) for d in range(corpus.n_docs)] == [(0, 3), (3, 6), (6, 10)]


def test_other_tokens_under_the_same_index_are_other_data(tmp_path: Path) -> None:
    prints = []
    for tokens in (FLAT, [*FLAT[:-1], 9]):
        prefix = write_megatron(tmp_path / "corpus")
        prefix.with_suffix(".bin").write_bytes(np.array(tokens, "<u2").tobytes())
        prints.append(open_megatron(str(prefix)).record)
    assert prints[0]["fingerprint"] == prints[1]["fingerprint"]
    assert prints[0]["tokens_fingerprint"] != prints[1]["tokens_fingerprint"]


def test_source_from_megatron_masks_documents(tmp_path: Path, make_config: Any) -> None:
    prefix = write_megatron(tmp_path / "corpus")
    cfg = make_config(
        source="megatron", path=str(prefix), seq_len=9, global_batch=1, shuffle=False, document_mask=True
    )
    batch = build_source(cfg).batch(0)
    assert batch.tokens.tolist() == [FLAT[:9]]
    assert batch.labels.tolist() == [[2, 3, -100, 5, 6, -100, 8, 9, 10]]


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path, make_config: Any) -> None:
    prefix = write_megatron(tmp_path / "corpus")
    source = build_source(
        make_config(vocab=10, source="megatron", path=str(prefix), seq_len=9, global_batch=1)
    )
    with pytest.raises(UserError, match=r"token id 10 in step 0 is outside model\.vocab=10"):
        source.batch(0)
    negative = np.array([-1, *FLAT[1:]], "<i4")
    write_megatron(tmp_path / "signed", 4, "<i4").with_suffix(".bin").write_bytes(negative.tobytes())
    cfg = make_config(source="megatron", path=str(tmp_path / "signed"), seq_len=9, global_batch=1)
    with pytest.raises(UserError, match="token id -1"):
        build_source(cfg).batch(0)


def _poke(path: Path, at: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(raw)


def test_damage_is_named(tmp_path: Path) -> None:
    index, tokens = tmp_path / "corpus.idx", tmp_path / "corpus.bin"

    def expect(match: str, at: int | None = None, new: bytes = b"") -> None:
        if at is not None:
            write_megatron(tmp_path / "corpus")
            _poke(index, at, new)
        with pytest.raises(UserError, match=match):
            open_megatron(str(tmp_path / "corpus"))

    expect(r"corpus\.idx: no such file")
    expect("wrong magic", 0, b"X")
    expect("index version 2", 9, struct.pack("<Q", 2))
    expect("dtype code 6 is not an integer", 17, b"\x06")
    expect("truncated or corrupt", 18, struct.pack("<Q", 400))
    expect("sequences do not lie end to end", 34, struct.pack("<i", 2))
    expect("sequences do not lie end to end", 34 + 16 + 8, struct.pack("<q", 4))
    expect("document index does not rise", 34 + 48 + 8, struct.pack("<q", 9))
    expect("document index does not rise", 34 + 48, struct.pack("<q", 1))
    write_megatron(tmp_path / "corpus")
    index.write_bytes(index.read_bytes()[:20])
    expect("truncated: 20 bytes")
    write_megatron(tmp_path / "corpus")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    expect(r"corpus\.bin: truncated: 19 bytes, the index needs 20")
    tokens.write_bytes(bytes(21))
    expect(r"corpus\.bin: longer than its index says")
    tokens.unlink()
    expect(r"corpus\.bin: no such file")
