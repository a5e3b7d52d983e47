"""Which keys each query sees, without a mask of all pairs.

Beside causality there are documents and a window. Both only raise the first key that a query sees: query i sees keys
``first(i) .. i``, where ``first(i)`` is the later of its document's first token and ``i - window + 1``. So documents
are triangles on the diagonal of the square, and a span of queries against a span of keys is a few rectangles, most of
them plain. Each kernel takes of it what it can use: rectangles, cumulative lengths, a block mask, or, for
the reference and tests, every pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainsys.ops.documents import Documents
from trainsys.ops.host_copy import to_device


@dataclass(frozen=True)
class Band:
    """Query r sees key c if ``0 <= r + behind - c``, and that is less than ``window`` where there is one."""

    behind: int
    window: int | None

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool ``[1, 1, queries, keys]``"""
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(self.behind)
        if self.window is not None:
            seen.triu_(self.behind - self.window + 1)
        return seen.view(1, 1, queries, keys)


Plain = Literal["all", "causal"]
"""All keys; or those up to the query's own place, as many keys as queries."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a block: ``rows`` of the batch, queries and keys by their index in the block's tensors."""

    rows: slice
    q: slice
    k: slice
    sees: Plain | Band


class Block:
    """The queries at places ``q`` of their row against the keys at places ``k``."""

    def __init__(self, rule: Rule, q: range, k: range) -> None:
        self.rule, self.q, self.k = rule, q, k
        self._made: dict[Any, Any] = {}

    def first(self) -> np.ndarray[Any, Any]:
        """The place of the first key that each query sees: int64 ``[B or 1, len(q)]``; the last is its own."""
        places = np.arange(self.q.start, self.q.stop)[None]
        window, docs = self.rule.window, self.rule.docs
        first = np.zeros_like(places) if window is None else np.maximum(places - window + 1, 0)
        if docs is None:
            return first
        return np.maximum(docs.starts()[:, self.q.start : self.q.stop], first)

    def mask(self, device: torch.device) -> Tensor:
        """Every pair, bool ``[B or 1, 1, len(q), len(k)]``: for a reference and for tests."""
        first = torch.from_numpy(self.first()).to(device).unsqueeze(-1)
        keys = torch.arange(self.k.start, self.k.stop, device=device)
        queries = torch.arange(self.q.start, self.q.stop, device=device).unsqueeze(-1)
        return ((keys >= first) & (keys <= queries)).unsqueeze(1)

    def pieces(self, tile: int | None = None) -> tuple[Piece, ...]:
        """Rectangles that hold every visible pair once, each query in one of them at most.

        ``tile``: at most so many queries in a piece that is a band, for kernels that need its mask.
        """
        if tile not in self._made:
            cut = (
                Piece(rows, _within(q, self.q), _within(k, self.k), sees)
                for rows, whole, keys in rectangles(self.rule, self.q, self.k)
                for q, k, sees in _cut(whole, keys, self.rule.window, tile)
            )
            self._made[tile] = tuple(cut)
        made: tuple[Piece, ...] = self._made[tile]
        return made

    def sequences(self, batch: int, device: torch.device) -> tuple[Tensor, int]:
        """The documents of a square on the diagonal (``q == k``) as sequences, ``batch`` rows laid end to end.
        Cumulative lengths, int32 ``[N + 1]`` on the device, and the longest."""
        assert self.q == self.k, (self.q, self.k)
        if ("sequences", batch, device) not in self._made:
            docs, size = self.rule.docs, len(self.q)
            rows = (((0, self.q.stop),),) if docs is None else docs.rows
            rows = rows * batch if len(rows) == 1 else rows
            edges = [0]
            for n, runs in enumerate(rows):
                inside = (min(end, self.q.stop) - self.q.start for _, end in runs)
                edges += [n * size + stop for stop in dict.fromkeys(inside) if stop > 0]
            cumulative = to_device(torch.tensor(edges, dtype=torch.int32), device)
            self._made["sequences", batch, device] = cumulative, int(np.diff(edges).max())
        found: tuple[Tensor, int] = self._made["sequences", batch, device]
        return found

    def once(self, key: object, make: Any) -> Any:
        """What ``make()`` returned for this ``key``: kernels keep here what all layers of a micro-batch share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


Visible = Plain | Block
"""Which of its keys a query sees, as kernels are told."""


Part = tuple[range, range, Visible]
"""Places of queries and of keys, and which of these each query sees."""


class Rule:
    """Which pairs a row's tokens may form beside causality. ``docs`` are those of whole rows.

    Made once a micro-batch, for all layers: blocks, and what kernels made for them, are kept here. No dataclass: FSDP2
    looks for tensors in every field of those that a module is given, and blocks know their rule.
    """

    def __init__(self, window: int | None = None, docs: Documents | None = None) -> None:
        self.window, self.docs = window, docs
        self._blocks: dict[tuple[range, range, bool], Part | None] = {}

    def block(self, q: range, k: range, *, whole: bool = False) -> Part | None:
        """The part of the queries at places ``q`` against the keys at ``k`` in which there is anything to see: queries,
        keys, and which of them each query sees. ``whole``: all queries and keys. None: nothing is visible."""
        key = q, k, whole
        if key not in self._blocks:
            self._blocks[key] = self._block(*key)
        return self._blocks[key]

    def _block(self, q: range, k: range, whole: bool) -> Part | None:
        found = list(rectangles(self, q, k))
        if not found:
            return None
        queries, keys = (
            range(min(r.start for r in each), max(r.stop for r in each))
            for each in ([rect[1] for rect in found], [rect[2] for rect in found])
        )
        if whole and (queries, keys) != (q, k):
            return q, k, Block(self, q, k)
        alike = all(rect[1:] == (queries, keys) for rect in found)
        if alike and len(found) == (1 if self.docs is None else len(self.docs.rows)):
            ((_, _, sees),) = _cut(queries, keys, self.window, None)
            if not isinstance(sees, Band):
                return queries, keys, sees
        return queries, keys, Block(self, queries, keys)


def rectangles(rule: Rule, q: range, k: range) -> Iterator[tuple[slice, range, range]]:
    """Rows, queries and keys of one document, trimmed: the first and the last query see a key, and the first and last
    key are seen."""
    docs = rule.docs
    if docs is None:
        if trimmed := _trimmed(q, k, rule.window):
            yield slice(None), *trimmed
        return
    for n, runs in enumerate(docs.rows):
        rows = slice(None) if len(docs.rows) == 1 else slice(n, n + 1)
        for start, stop in runs:
            mine = range(max(start, q.start), min(stop, q.stop))
            theirs = range(max(start, k.start), min(stop, k.stop))
            if mine and theirs and (trimmed := _trimmed(mine, theirs, rule.window)):
                yield rows, *trimmed


def _trimmed(q: range, k: range, window: int | None) -> tuple[range, range] | None:
    q, k = range(max(q.start, k.start), q.stop), range(k.start, min(k.stop, q.stop))
    if window is not None and q and k:
        q = range(q.start, min(q.stop, k.stop - 1 + window))
        k = range(max(k.start, q.start - window + 1), k.stop)
    return (q, k) if q and k else None


def _cut(q: range, k: range, window: int | None, tile: int | None) -> Iterator[tuple[range, range, Plain | Band]]:
    """A trimmed rectangle as it is where it is plain, else as a band, ``tile`` queries at a time."""
    if window is None or q.stop - 1 - k.start < window:
        window = None
        if k.stop - 1 <= q.start:
            yield q, k, "all"
            return
        if q == k:
            yield q, k, "causal"
            return
    if tile is None or len(q) <= tile:
        yield q, k, Band(q.start - k.start, window)
        return
    for start in range(q.start, q.stop, tile):
        part = _trimmed(range(start, min(start + tile, q.stop)), k, window)
        if part is not None:
            yield from _cut(*part, window, None)


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
