from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.data import shards
from trainsys.data.shards import ShardWriter, list_shards, open_shard, open_shards, shard_fingerprint
from trainsys.data.tokenizer import ByteTokenizer
from trainsys.errors import UserError


class WideTokenizer(ByteTokenizer):
    fingerprint = "wide"
    vocab_size = 100_000


def write(
    folder: Path, docs: list[list[int]], tokenizer: ByteTokenizer | None = None, limit: int = 10**9
) -> list[Path]:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, tokenizer or ByteTokenizer(), limit) as writer:
        for doc in docs:
            writer.add(np.array(doc, np.uint32))
    return list_shards(folder)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path, [[1, 2, 3], [4] * 50, [5]])[0]


@settings(max_examples=40)
@given(
    docs=st.lists(st.lists(st.integers(0, 99_999), max_size=40), min_size=1, max_size=20),
    limit=st.integers(1, 90),
)
def test_documents_come_back_whole_with_their_end_token(
    docs: list[list[int]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = WideTokenizer()
    folder = tmp_path_factory.mktemp("shards")
    opened = open_shards(write(folder, docs, tokenizer, limit))
    back = [
        shard.tokens[a:b].tolist()
        for shard in opened
        for a, b in zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True)
    ]
    kept = [doc for doc in docs if doc]
    assert back == [[*doc, tokenizer.eos] for doc in kept]
    for shard in opened:
        shard.verify()
        assert shard.max_token == shard.tokens.max()
        assert shard.doc_offsets[-2] < limit, "a full shard was not closed"


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), "uint16"), (WideTokenizer(), "uint32")])
def test_item_size_follows_the_vocabulary(tmp_path: Path, tokenizer: ByteTokenizer, dtype: str) -> None:
    opened = open_shard(write(tmp_path, [[1, 2]], tokenizer)[0])
    assert opened.tokens.dtype == dtype
    assert opened.meta["vocab_size"] == tokenizer.vocab_size


def test_several_blocks(tmp_path: Path) -> None:
    ids = np.arange(1_300_000) % 256  # 2.6 MB: three blocks
    opened = open_shard(write(tmp_path, [ids.tolist()])[0])
    assert len(opened.block_crcs) == 3
    opened.verify()
    assert np.array_equal(opened.tokens[:-1], ids)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.tok: cannot open token shard: No such file"):
        open_shard(tmp_path / "nothing.tok")


def test_not_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tok"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"a\.tok: not a trainsys token shard"):
        open_shard(path)


def test_truncation_is_noticed_at_every_length(shard: Path) -> None:
    raw = shard.read_bytes()
    for size in range(len(raw)):
        shard.write_bytes(raw[:size])
        with pytest.raises(UserError, match=str(shard)):
            open_shard(shard)
    shard.write_bytes(raw + b"x")
    with pytest.raises(UserError, match="longer than its header says"):
        open_shard(shard)


def test_any_flipped_byte_is_noticed(shard: Path) -> None:
    """On opening, or for the tokens themselves (and their padding, which means nothing) by verify."""
    raw = shard.read_bytes()
    opened = open_shard(shard)
    tokens_end = 64 + opened.tokens.nbytes
    padded_end = -(-tokens_end // 8) * 8
    for at in [*range(tokens_end), *range(padded_end, len(raw))]:
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        with pytest.raises(UserError, match=str(shard)):
            open_shard(shard).verify()
        if not 64 <= at < tokens_end:
            with pytest.raises(UserError, match=str(shard)):
                open_shard(shard)


def test_corrupt_token_names_block_and_byte(shard: Path) -> None:
    raw = bytearray(shard.read_bytes())
    raw[70] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="corrupt: token block 0 at byte 64 fails its checksum"):
        open_shard(shard).verify()


def test_wrong_version(shard: Path) -> None:
    raw = bytearray(shard.read_bytes())
    struct.pack_into("<I", raw, 8, 9)
    struct.pack_into("<I", raw, 60, zlib.crc32(raw[:60]))
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="shard format version 9, this trainsys reads 1"):
        open_shard(shard)


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    paths = write(tmp_path, [[1] * 10] * 4, limit=10)
    assert len(paths) == 4
    paths[2].unlink()
    with pytest.raises(UserError, match=r"shard_00002\.tok: cannot open"):
        open_shards(list_shards(tmp_path))
    (tmp_path / shards.INDEX).write_text(json.dumps({"shards": 3}))
    with pytest.raises(UserError, match=r"index\.json: not a shard index"):
        list_shards(tmp_path)
    (tmp_path / shards.INDEX).unlink()
    assert len(open_shards(list_shards(tmp_path))) == 3


def test_shards_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", [[1]]) + write(tmp_path / "b", [[1]], WideTokenizer())
    with pytest.raises(UserError, match="made with tokenizer wide"):
        open_shards(paths)


def test_fingerprint_is_of_the_tokens_not_of_the_place(tmp_path: Path) -> None:
    one, same, other = (
        shard_fingerprint(open_shards(write(tmp_path / name, docs)))
        for name, docs in [("a", [[1, 2], [3]]), ("b", [[1, 2], [3]]), ("c", [[1, 2], [4]])]
    )
    assert one == same != other
