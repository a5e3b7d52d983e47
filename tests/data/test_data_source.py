from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.data.packing import ConcatPacking, Counts, PadPacking
from trainsys.data.prepare import prepare
from trainsys.data.source import Source, build_source
from trainsys.data.tokenizer import ByteTokenizer
from trainsys.errors import UserError


def make_source(
    corpus: Any, size: int = 4, batch: int = 3, *, pad: bool = False, mask: bool = False, **kw: Any
) -> Source:
    packing = (PadPacking if pad else ConcatPacking)(corpus, size, mask, None)
    settings = {"vocab": 10**7, "seed": 0, "shuffle": True, **kw}
    return Source(corpus, packing, seq_len=size, global_batch=batch, **settings)


@given(
    lengths=st.lists(st.integers(2, 30), min_size=3, max_size=12),
    batch=st.integers(1, 9),
    seed=st.integers(0, 9),
    pad=st.booleans(),
    mask=st.booleans(),
    step=st.integers(0, 50),
    data=st.data(),
)
def test_rows_are_pure(
    lengths: list[int],
    batch: int,
    seed: int,
    pad: bool,
    mask: bool,
    step: int,
    data: st.DataObject,
    make_corpus: Any,
) -> None:
    """Any rows of any step, in any order, from a fresh source or a used one, are those of the whole batch."""
    source = make_source(make_corpus(lengths, 2), batch=batch, seed=seed, pad=pad, mask=mask)
    whole = source.batch(step)
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch))
    source.batch(data.draw(st.integers(0, 9)))
    part = make_source(make_corpus(lengths), batch=batch, seed=seed, pad=pad, mask=mask).rows(step, rows)
    for field in ("tokens", "labels", "positions", "doc_ids"):
        expected, got = getattr(whole, field), getattr(part, field)
        assert (got is None) == (expected is None)
        if got is not None:
            assert got.dtype == np.int64
            assert np.array_equal(got, expected[rows])
            assert np.array_equal(getattr(source.rows(step, rows), field), got)
    assert source.counts(step) == whole.counts
    assert whole.counts.valid_tokens == (whole.labels != -100).sum()
    assert whole.counts.padded_tokens == (whole.tokens == 10**6).sum()
    assert whole.counts.real_tokens + whole.counts.padded_tokens == whole.tokens.size


@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 99), shuffle=st.booleans())
def test_each_epoch_visits_every_sample_once(
    n: int, batch: int, seed: int, shuffle: bool, make_corpus: Any
) -> None:
    source = make_source(make_corpus([4 * n + 1]), batch=batch, seed=seed, shuffle=shuffle)
    assert source.n_samples == n
    steps = -(-3 * n // batch)
    order = np.concatenate([source.samples(step, range(batch)) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    if not shuffle:
        assert order.tolist() == [i % n for i in range(steps * batch)]


def test_order_changes_with_seed_and_epoch_but_not_with_batch_size(make_corpus: Any) -> None:
    def order(seed: int, batch: int) -> list[int]:
        source = make_source(make_corpus([4 * 60 + 1]), batch=batch, seed=seed)
        return [int(i) for step in range(120 // batch) for i in source.samples(step, range(batch))]

    assert order(0, 4) == order(0, 12)
    assert order(0, 4) != order(1, 4)
    assert order(0, 4)[:60] != order(0, 4)[60:]


def test_stdlib_end_to_end(tmp_path: Path, make_config: Any) -> None:
    cfg = make_config(cache_dir=str(tmp_path), seq_len=64, global_batch=2)
    source = build_source(cfg)
    batch = source.batch(3)
    assert batch.tokens.shape == (2, 64)
    assert np.array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.doc_ids is None
    assert batch.counts == Counts(128, 128, 0, 64 * 65)
    record = source.describe()
    assert record["source"] == "stdlib"
    assert record["python"] == sys.version.split()[0]
    assert len(record["fingerprint"]) == 64
    assert record["tokens"] > 10**6
    valid = build_source(make_config(cache_dir=str(tmp_path), split="valid"))
    assert valid.describe()["fingerprint"] != record["fingerprint"]
    assert np.array_equal(build_source(cfg).batch(3).tokens, batch.tokens)


def test_vocabulary_too_small(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("text long enough for one row")
    settings = {"source": "text", "path": str(tmp_path), "cache_dir": str(tmp_path / "c")}
    with pytest.raises(
        UserError, match=r"model\.vocab=258 is smaller than the 259 ids .*set model\.vocab>=259"
    ):
        build_source(make_config(vocab=258, **settings))
    build_source(make_config(vocab=259, **settings))


def test_corpus_smaller_than_a_sequence(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("x" * 16)
    settings = {"source": "text", "path": str(tmp_path), "cache_dir": str(tmp_path / "c")}
    with pytest.raises(UserError, match=r"17 tokens are fewer than one sequence of train\.seq_len=17"):
        build_source(make_config(**settings, seq_len=17))
    assert build_source(make_config(**settings, seq_len=16)).n_samples == 1


def test_empty_corpus(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no text in it"):
        build_source(make_config(source="text", path=str(tmp_path), cache_dir=str(tmp_path / "c")))


def test_shards_give_the_batches_of_the_text_they_were_made_of(tmp_path: Path, make_config: Any) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(9):
        (texts / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    prepare(str(texts), str(tmp_path / "shards"), source="text", shard_tokens=100)
    assert len(list((tmp_path / "shards").glob("*.tok"))) > 2
    settings: dict[str, Any] = {"document_mask": True, "seq_len": 30}
    direct = build_source(
        make_config(source="text", path=str(texts), cache_dir=str(tmp_path / "c"), **settings)
    )
    for path in (tmp_path / "shards", tmp_path / "shards" / "*.tok"):
        prepared = build_source(make_config(source="shards", path=str(path), **settings))
        for step in range(6):
            assert np.array_equal(prepared.batch(step).tokens, direct.batch(step).tokens)
            assert np.array_equal(prepared.batch(step).labels, direct.batch(step).labels)
        assert prepared.describe()["tokenizer"] == ByteTokenizer.fingerprint


def test_shards_and_a_tokenizer_that_did_not_make_them(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text of one document")
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "shards"))
    settings = {"source": "shards", "path": str(tmp_path / "shards")}
    build_source(make_config(**settings, tokenizer="bytes"))
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "another")
    build_source(make_config(**settings))
    with pytest.raises(UserError, match=r"data\.tokenizer=bytes did not make .*\(made with bytes-v1\)"):
        build_source(make_config(**settings, tokenizer="bytes"))


def test_flipped_tokens_stop_the_run(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("some text of one document, quite long")
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "shards"))
    (path,) = (tmp_path / "shards").glob("*.tok")
    raw = bytearray(path.read_bytes())
    raw[64 : 64 + 40] = b"\xff" * 40
    path.write_bytes(raw)
    source = build_source(make_config(source="shards", path=str(path)))
    with pytest.raises(UserError, match=r"token id 65535 in step 0 is outside model\.vocab=320"):
        source.batch(0)


def test_synthetic(make_config: Any) -> None:
    source = build_source(make_config(vocab=100, source="synthetic", document_mask=True, seq_len=2048))
    batch = source.batch(0)
    assert batch.doc_ids is not None
    assert batch.doc_ids.max() >= 1
    assert batch.tokens.max() < 100
    other = build_source(make_config(vocab=100, source="synthetic", seed=1, seq_len=2048)).batch(0)
    assert not np.array_equal(other.tokens, batch.tokens)


def test_sliding_window_reaches_the_counts(make_config: Any) -> None:
    source = build_source(make_config(window=4, source="synthetic", seq_len=16, global_batch=2))
    assert source.counts(0).attn_pairs == 2 * (10 + 12 * 4)


def test_no_torch() -> None:
    code = "import sys, trainsys.data, trainsys.data.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
