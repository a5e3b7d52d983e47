from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.data.corpus import Corpus, synthetic_corpus
from trainsys.data.packing import IGNORE, ConcatPacking, Counts, PadPacking, causal_pairs
from trainsys.errors import UserError

lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(lengths=lengths_of, cut=st.integers(1, 5), data=st.data())
def test_corpus_reads_across_segments(
    lengths: list[int], cut: int, data: st.DataObject, make_corpus: Any
) -> None:
    corpus: Corpus = make_corpus(lengths, cut)
    total = sum(lengths)
    assert (corpus.n_tokens, corpus.n_docs) == (total, len(lengths))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert corpus.read(start, stop).tolist() == list(range(start, stop))
    begins = np.cumsum([0, *lengths[:-1]])
    assert corpus.doc_starts(start, stop).tolist() == [b for b in begins if start <= b < stop]
    assert [corpus.doc_span(d) for d in range(corpus.n_docs)] == [
        (b, b + n) for b, n in zip(begins, lengths, strict=True)
    ]
    assert corpus.doc_lengths().tolist() == lengths


@given(lengths=lengths_of, size=st.integers(1, 12), cut=st.integers(1, 5))
def test_concat_uses_each_token_once_as_input_and_once_as_label(
    lengths: list[int], size: int, cut: int, make_corpus: Any
) -> None:
    corpus = make_corpus(lengths, cut)
    if corpus.n_tokens <= size:
        with pytest.raises(UserError, match="fewer than one sequence"):
            ConcatPacking(corpus, size, False, None)
        return
    packing = ConcatPacking(corpus, size, False, None)
    rows = [packing.row(i) for i in range(packing.n_samples)]
    used = packing.n_samples * size
    assert corpus.n_tokens - 1 - used < size, "more than a remainder is left out"
    assert np.concatenate([r.tokens for r in rows]).tolist() == list(range(used))
    assert np.concatenate([r.labels for r in rows]).tolist() == list(range(1, used + 1))
    assert all(r.positions.tolist() == list(range(size)) and r.doc_ids is None for r in rows)
    assert packing.count(0) == Counts(size, size, 0, size * (size + 1) // 2)


@given(
    lengths=lengths_of, size=st.integers(1, 12), cut=st.integers(1, 5), window=st.none() | st.integers(1, 6)
)
def test_document_mask(lengths: list[int], size: int, cut: int, window: int | None, make_corpus: Any) -> None:
    """Against the definition, token by token: token p of the corpus is p, so its document is known."""
    corpus = make_corpus(lengths, cut)
    if corpus.n_tokens <= size:
        return
    doc_of = np.repeat(np.arange(len(lengths)), lengths)
    packing = ConcatPacking(corpus, size, True, window)
    for sample in range(packing.n_samples):
        row = packing.row(sample)
        start = sample * size
        assert row.tokens.tolist() == list(range(start, start + size))
        docs = doc_of[start : start + size]
        assert row.doc_ids is not None
        assert row.doc_ids.tolist() == (docs - docs[0]).tolist()
        for j in range(size):
            same = doc_of[start + j + 1] == docs[j]
            assert row.labels[j] == (start + j + 1 if same else IGNORE)
            assert row.positions[j] == sum(docs[:j] == docs[j])
        seen = [
            (q, k)
            for q in range(size)
            for k in range(q + 1)
            if docs[q] == docs[k] and (window is None or q - k < window)
        ]
        valid = int((row.labels != IGNORE).sum())
        assert packing.count(sample) == Counts(valid, size, 0, len(seen))


@given(lengths=lengths_of, size=st.integers(1, 12), mask=st.booleans(), window=st.none() | st.integers(1, 6))
def test_pad(lengths: list[int], size: int, mask: bool, window: int | None, make_corpus: Any) -> None:
    corpus = make_corpus(lengths, 3)
    begins = np.cumsum([0, *lengths[:-1]]).tolist()
    documents = [(b, n) for b, n in zip(begins, lengths, strict=True) if n > 1]
    if not documents:
        with pytest.raises(UserError, match="no document of two tokens"):
            PadPacking(corpus, size, mask, window)
        return
    packing = PadPacking(corpus, size, mask, window)
    assert packing.n_samples == len(documents)
    for sample, (begin, length) in enumerate(documents):
        row = packing.row(sample)
        used = min(length - 1, size)
        fill = size - used
        assert row.tokens.tolist() == [*range(begin, begin + used), *[corpus.pad] * fill]
        assert row.labels.tolist() == [*range(begin + 1, begin + used + 1), *[IGNORE] * fill]
        assert row.positions.tolist() == list(range(size))
        if mask:
            assert row.doc_ids is not None
            assert row.doc_ids.tolist() == [0] * used + [1] * fill
        else:
            assert row.doc_ids is None
        assert packing.count(sample) == Counts(used, used, fill, causal_pairs(used, window))


@given(n=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_causal_pairs_by_counting(n: int, window: int | None) -> None:
    reach = n if window is None else window
    assert causal_pairs(n, window) == sum(1 for q in range(n) for k in range(q + 1) if q - k < reach)


def test_synthetic_is_pure_and_fills_the_vocabulary() -> None:
    corpus = synthetic_corpus(50, 1, n_tokens=20_000)
    whole = corpus.read(0, 20_000)
    assert corpus.read(777, 1234).tolist() == whole[777:1234].tolist()
    assert set(whole.tolist()) == set(range(50))
    assert np.bincount(whole).min() > 250
    assert not np.array_equal(whole, synthetic_corpus(50, 2, n_tokens=20_000).read(0, 20_000))
    lengths = corpus.doc_lengths()
    assert lengths.sum() == 20_000
    assert lengths[:-1].min() >= 32
    assert lengths.max() <= 2015
