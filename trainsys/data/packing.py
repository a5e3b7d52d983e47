"""Documents into rows of ``seq_len`` tokens, and the counts that make FLOPs and averages exact.

``concat`` lays documents end to end and cuts windows of S+1 tokens that overlap by one: row i is inputs
[iS, iS+S) and labels [iS+1, iS+S+1), so over an epoch each token is an input once and a label once.
``pad`` gives a document a row: cut at S+1 tokens or filled with PAD.

With a document mask a token sees its own document only, positions restart at each document (and at the
row's start), and the first token of a document is nobody's label: its predecessor, the end-of-text token of
the document before, cannot know it. End-of-text itself is predicted. Without a mask ``doc_ids`` is None,
positions are 0..S-1 and every token is predicted from the whole row before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainsys.data.corpus import Corpus
from trainsys.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Counts:
    """What a set of rows holds.

    valid_tokens: labels that count in the loss. real_tokens: inputs that are not padding. padded_tokens:
    inputs that are. attn_pairs: (query, key) pairs that attention must compute over real tokens: causal,
    within a document where there is a mask, within the window where the model has one.
    """

    valid_tokens: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    attn_pairs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.valid_tokens + other.valid_tokens,
            self.real_tokens + other.real_tokens,
            self.padded_tokens + other.padded_tokens,
            self.attn_pairs + other.attn_pairs,
        )


@dataclass(frozen=True)
class Batch:
    """Rows of a step. ``tokens, labels, positions [B,S]`` int64, labels -100 where not predicted.

    ``doc_ids [B,S]`` int64 numbers the documents of a row from 0 (padding gets a number of its own), or is
    None when there is no document mask and attention is plainly causal.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    doc_ids: NDArray[np.int64] | None
    counts: Counts


def causal_pairs(n: int, window: int | None) -> int:
    """(query, key) pairs of n tokens that see themselves and what precedes, at most ``window`` keys each."""
    if window is None or n <= window:
        return n * (n + 1) // 2
    return window * (window + 1) // 2 + (n - window) * window


@dataclass(frozen=True)
class Row:
    """One row of a batch, each array ``[S]``."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    doc_ids: NDArray[np.int64] | None


class ConcatPacking:
    """Sample i is the window of S+1 tokens that starts at i*S."""

    def __init__(self, corpus: Corpus, seq_len: int, document_mask: bool, window: int | None) -> None:
        self.n_samples = max(corpus.n_tokens - 1, 0) // seq_len
        if not self.n_samples:
            raise UserError(
                f"{corpus.name}: {corpus.n_tokens} tokens are fewer than one sequence of "
                f"train.seq_len={seq_len} and its last label; use more text or a shorter seq_len"
            )
        self._corpus, self._seq_len, self._mask, self._window = corpus, seq_len, document_mask, window
        self._plain = Counts(seq_len, seq_len, 0, causal_pairs(seq_len, window))

    def row(self, sample: int) -> Row:
        start, size = sample * self._seq_len, self._seq_len
        window = self._corpus.read(start, start + size + 1)
        tokens, labels, positions = window[:-1], window[1:].copy(), np.arange(size)
        if not self._mask:
            return Row(tokens, labels, positions, None)
        begins = self._begins(start)
        labels[begins[begins > 0] - 1] = IGNORE
        begins = begins[begins < size]
        doc_ids = np.zeros(size, np.int64)
        doc_ids[begins[begins > 0]] = 1
        doc_ids = np.cumsum(doc_ids)
        firsts = np.concatenate([[0], begins[begins > 0]])
        return Row(tokens, labels, positions - firsts[doc_ids], doc_ids)

    def count(self, sample: int) -> Counts:
        """Counts of ``row(sample)`` from the document index alone."""
        if not self._mask:
            return self._plain
        begins = self._begins(sample * self._seq_len)
        begins = begins[begins > 0]
        size = self._seq_len
        edges = [0, *begins[begins < size].tolist(), size]
        pairs = sum(causal_pairs(b - a, self._window) for a, b in pairwise(edges))
        return Counts(size - len(begins), size, 0, pairs)

    def _begins(self, start: int) -> NDArray[np.int64]:
        """Where documents begin in the window of S+1 tokens, relative to its start."""
        return self._corpus.doc_starts(start, start + self._seq_len + 1) - start


class PadPacking:
    """Sample i is the i-th document of two tokens or more (one token predicts nothing), cut after S+1."""

    def __init__(self, corpus: Corpus, seq_len: int, document_mask: bool, window: int | None) -> None:
        self._corpus, self._seq_len, self._mask, self._window = corpus, seq_len, document_mask, window
        short = corpus.doc_lengths() < 2
        self._docs: NDArray[np.int64] | None = np.flatnonzero(~short) if short.any() else None
        self.n_samples = corpus.n_docs if self._docs is None else len(self._docs)
        if not self.n_samples:
            raise UserError(f"{corpus.name}: no document of two tokens or more; use more text")

    def row(self, sample: int) -> Row:
        start, used = self._span(sample)
        size = self._seq_len
        text = self._corpus.read(start, start + used + 1)
        tokens = np.full(size, self._corpus.pad, np.int64)
        labels = np.full(size, IGNORE, np.int64)
        tokens[:used], labels[:used] = text[:-1], text[1:]
        doc_ids = (np.arange(size) >= used).astype(np.int64) if self._mask else None
        return Row(tokens, labels, np.arange(size), doc_ids)

    def count(self, sample: int) -> Counts:
        """Counts of ``row(sample)`` from the document index alone."""
        _, used = self._span(sample)
        return Counts(used, used, self._seq_len - used, causal_pairs(used, self._window))

    def _span(self, sample: int) -> tuple[int, int]:
        """First position and number of inputs; the token after the last input is its label."""
        start, stop = self._corpus.doc_span(sample if self._docs is None else int(self._docs[sample]))
        return start, min(stop - start - 1, self._seq_len)


Packing = ConcatPacking | PadPacking


def stack(rows: Sequence[Row], counts: Counts) -> Batch:
    """Rows into one batch."""
    docs = [row.doc_ids for row in rows if row.doc_ids is not None]
    return Batch(
        tokens=np.stack([row.tokens for row in rows]),
        labels=np.stack([row.labels for row in rows]),
        positions=np.stack([row.positions for row in rows]).astype(np.int64),
        doc_ids=np.stack(docs) if docs else None,
        counts=counts,
    )
