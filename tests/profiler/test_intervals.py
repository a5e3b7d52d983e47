"""Interval algebra against brute force on a bitmap."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.profiler.trace import intervals as iv

N = 40
pairs = st.lists(st.tuples(st.integers(0, N), st.integers(0, N)), max_size=14)


def bits(raw: list[tuple[int, int]]) -> np.ndarray:
    out = np.zeros(N + 1, bool)
    for a, b in raw:
        out[a:b] = True
    return out


def make(raw: list[tuple[int, int]]) -> iv.Spans:
    at = np.array(raw, np.int64).reshape(-1, 2)
    return iv.union(at[:, 0], at[:, 1])


def bits_of(spans: iv.Spans) -> np.ndarray:
    starts, ends = spans
    assert (starts < ends).all()
    assert (starts[1:] > ends[:-1]).all()
    return bits(list(zip(starts.tolist(), ends.tolist(), strict=True)))


@settings(max_examples=300, deadline=None)
@given(pairs, pairs, st.integers(0, N), st.integers(0, N))
def test_algebra_is_that_of_sets(raw_a, raw_b, low, high):
    a, b = make(raw_a), make(raw_b)
    x, y = bits(raw_a), bits(raw_b)
    assert (bits_of(a) == x).all()
    assert iv.total(a) == x.sum()
    assert (bits_of(iv.merge(a, b)) == (x | y)).all()
    assert (bits_of(iv.subtract(a, b)) == (x & ~y)).all()
    assert (bits_of(iv.intersect(a, b)) == (x & y)).all()
    window = bits([(low, high)])
    assert (bits_of(iv.clip(a, low, high)) == (x & window)).all()
    assert (bits_of(iv.complement(a, low, high)) == (~x & window)).all()


@settings(max_examples=200, deadline=None)
@given(pairs, pairs)
def test_covered_and_contains(raw_a, queries):
    a, x = make(raw_a), bits(raw_a)
    queries = [(min(q), max(q)) for q in queries]
    at = np.array(queries, np.int64).reshape(-1, 2)
    assert iv.covered(a, at[:, 0], at[:, 1]).tolist() == [int(x[p:q].sum()) for p, q in queries]
    assert iv.contains(a, np.arange(N + 1)).tolist() == x.tolist()


def test_large_values_stay_exact():
    base = 1_790_857_026_000_000_000
    spans = iv.union(np.array([base + 1, base + 5]), np.array([base + 3, base + 6]))
    assert iv.total(spans) == 3


@settings(max_examples=200, deadline=None)
@given(pairs, pairs)
def test_inside_each_is_a_clip_for_each(raw_a, queries):
    a = make(raw_a)
    at = np.array(queries, np.int64).reshape(-1, 2)
    parts = zip(*(column.tolist() for column in iv.inside_each(a, at[:, 0], at[:, 1])), strict=True)
    expected = []
    for i, (low, high) in enumerate(queries):
        starts, ends = iv.clip(a, low, high)
        expected += [(i, p, q) for p, q in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert list(parts) == expected


@given(st.lists(st.integers(-5, 5)), st.lists(st.integers(-5, 5)))
def test_distinct_and_among(values, some):
    a, b = np.array(values, np.int64), np.array(some, np.int64)
    assert iv.distinct(a).tolist() == sorted(set(values))
    assert iv.among(a, b).tolist() == [v in some for v in values]
