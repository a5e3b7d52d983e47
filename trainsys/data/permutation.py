"""A shuffle without a table: a keyed bijection of 0..n-1, evaluated point by point in O(1) memory.

A Feistel network over pairs (left, right) of Z_a x Z_a with a = ceil(sqrt(n)) permutes a*a >= n points;
points that land outside 0..n-1 are sent through it again until they land inside ("cycle walking"), which
keeps the map a bijection: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. As
a*a < n + 2*sqrt(n) + 1, few points walk. The round function is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): fixed
arithmetic, so the order does not depend on the version of any library.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: U64) -> U64:
    """64-bit hash of each element, arithmetic modulo 2**64; of arrays, as numpy warns of scalars that wrap."""
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_keys(*parts: int, count: int) -> U64:
    """``count`` 64-bit keys from a tuple of non-negative integers, e.g. (seed, epoch)."""
    state: U64 = np.array([0], np.uint64)
    for part in parts:
        word: U64 = np.array([part % 2**64], np.uint64)
        state = splitmix64(state ^ splitmix64(word))
    serial: U64 = np.arange(count, dtype=np.uint64)
    return splitmix64(state + serial)


def permute(index: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Image of each ``index`` (in 0..n-1) under the permutation of 0..n-1 that (seed, epoch) names."""
    assert n >= 1
    assert index.size == 0 or (index.min() >= 0 and index.max() < n)
    side = np.uint64(isqrt(n - 1) + 1)
    keys = derive_keys(seed, epoch, count=_ROUNDS)
    image = _feistel(index.astype(np.uint64), side, keys)
    outside = image >= n
    while outside.any():
        image[outside] = _feistel(image[outside], side, keys)
        outside = image >= n
    return image.astype(np.int64)


def _feistel(x: U64, side: np.uint64, keys: U64) -> U64:
    left, right = x // side, x % side
    for key in keys:
        left, right = right, (left + splitmix64(right ^ key) % side) % side
    return left * side + right
