"""A corpus as one long row of tokens cut into documents, whatever files hold it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainsys.data.permutation import derive_keys, splitmix64


class TokenArray(Protocol):
    """What slices like a one-dimensional integer array: a memory map, or tokens made on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together. ``doc_offsets[n_docs+1]``: strictly rising, from 0 to len(tokens)."""

    tokens: TokenArray
    doc_offsets: NDArray[Any]


@dataclass
class Corpus:
    """Segments end to end; positions and document numbers run over the whole corpus.

    ``vocab_size`` is one more than the largest id that may occur, ``None`` where the format does not say.
    ``record`` is what the run's record keeps: where the text came from and its fingerprint.
    """

    name: str
    segments: Sequence[Segment]
    pad: int
    vocab_size: int | None
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._starts = [0, *accumulate(len(s.tokens) for s in self.segments)]
        self._docs = [0, *accumulate(len(s.doc_offsets) - 1 for s in self.segments)]

    @property
    def n_tokens(self) -> int:
        return self._starts[-1]

    @property
    def n_docs(self) -> int:
        return self._docs[-1]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop), copied out as int64."""
        assert 0 <= start <= stop <= self.n_tokens
        out = np.empty(stop - start, np.int64)
        for i in self._touched(start, stop):
            base, end = self._starts[i], self._starts[i + 1]
            lo, hi = max(start, base), min(stop, end)
            out[lo - start : hi - start] = self.segments[i].tokens[lo - base : hi - base]
        return out

    def doc_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions in [start, stop) at which a document begins, rising. Reads the index alone, no tokens."""
        found = []
        for i in self._touched(start, stop):
            base, offsets = self._starts[i], self.segments[i].doc_offsets[:-1]
            lo, hi = np.searchsorted(offsets, np.array([max(start - base, 0), stop - base], offsets.dtype))
            found.append(offsets[lo:hi].astype(np.int64) + base)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def doc_span(self, doc: int) -> tuple[int, int]:
        """Positions [start, stop) of document ``doc``."""
        i = bisect_right(self._docs, doc) - 1
        base, offsets, local = self._starts[i], self.segments[i].doc_offsets, doc - self._docs[i]
        return base + int(offsets[local]), base + int(offsets[local + 1])

    def doc_lengths(self) -> NDArray[np.int64]:
        """Length of every document: reads the whole index."""
        return np.concatenate([np.diff(s.doc_offsets.astype(np.int64)) for s in self.segments])

    def _touched(self, start: int, stop: int) -> range:
        first = bisect_right(self._starts, start) - 1
        last = first
        while last < len(self.segments) and self._starts[last] < stop:
            last += 1
        return range(first, last)


@dataclass(frozen=True)
class HashedTokens:
    """``count`` uniform token ids in [0, vocab), each a hash of (seed, position): nothing is stored."""

    count: int
    vocab: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, where: slice, /) -> NDArray[np.int64]:
        key = derive_keys(self.seed, count=1)
        position = np.arange(*where.indices(self.count), dtype=np.uint64)
        return (splitmix64(position ^ key) % np.uint64(self.vocab)).astype(np.int64)


def synthetic_corpus(vocab: int, seed: int, n_tokens: int = 1 << 24) -> Corpus:
    """Random tokens in documents of 32 to 2015 tokens, for benchmarks: the best loss is log(vocab)."""
    lengths = splitmix64(derive_keys(seed, 1, count=n_tokens // 32)) % np.uint64(1984) + np.uint64(32)
    ends = np.cumsum(lengths).astype(np.int64)
    offsets = np.concatenate([[0], ends[ends < n_tokens], [n_tokens]]).astype(np.int64)
    record = {"source": "synthetic", "fingerprint": f"synthetic-v1-{vocab}-{seed}-{n_tokens}"}
    return Corpus("synthetic", [Segment(HashedTokens(n_tokens, vocab, seed), offsets)], 0, vocab, record)
