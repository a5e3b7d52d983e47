"""A column of integers in about as few bits as its noise has, with numpy alone.

Three things make a run's numbers small: their differences (a counter's are 1, a schedule's are smooth to the third
order), a common divisor (pages of memory), and being near their median. What is left is noise, for which Rice's code is
within a few tenths of a bit of the entropy: the low ``bits`` as they are, the rest in unary (Rice & Plaunt 1971). Values
that are far out are kept whole, so one jump costs eight bytes and not the column.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]

ORDERS = 3
FAR = 24
"""Quotients from here on are kept whole."""
MOST = 1 << 24
"""Values in a column; more is no column of ours."""


class Packed(msgspec.Struct, array_like=True):
    """One column. Everything that is a number of the code stands here, its bits in ``unary`` and ``low``."""

    count: int
    starts: list[int] = []
    """The first value of each order of differences; its length is the order."""
    middle: int = 0
    divisor: int = 1
    bits: int = 0
    unary: bytes = b""
    low: bytes = b""
    far: bytes = b""


def pack(values: Ints) -> Packed:
    """``values[n]``, any int64: differences wrap around and come back."""
    starts: list[int] = []
    rest, best, best_cost = values, (values, 0), np.inf
    for order in range(ORDERS + 1):
        cost = _cost(rest)
        if cost < best_cost - 1.0:
            best, best_cost = (rest, order), cost
        if rest.size < 3 or cost <= rest.size:
            break
        starts.append(int(rest[0]))
        rest = rest[1:] - rest[:-1]
    rest, order = best
    packed = Packed(values.size, starts[:order])
    if not rest.size:
        return packed
    packed.middle = int(np.partition(rest, rest.size // 2)[rest.size // 2])
    rest = rest - packed.middle
    if not rest.any():
        return packed
    if np.abs(rest).min() >= 0:  # the lowest int64 has no absolute value
        packed.divisor = max(1, int(np.gcd.reduce(np.abs(rest))))
        rest = rest // packed.divisor
    zigzag = _zigzag(rest)
    packed.bits = _bits(zigzag)
    quotients = np.minimum(zigzag >> np.uint64(packed.bits), FAR).astype(np.int64)
    ends = np.cumsum(quotients + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    packed.unary = np.packbits(unary).tobytes()
    near = zigzag[quotients < FAR]
    places = np.arange(packed.bits, dtype=np.uint64)
    packed.low = np.packbits(((near[:, None] >> places) & np.uint64(1)).astype(np.uint8)).tobytes()
    packed.far = zigzag[quotients == FAR].astype("<u8").tobytes()
    return packed


def unpack(packed: Packed) -> Ints:
    """What ``pack`` was given. Raises ValueError for what it cannot have made."""
    order, size = len(packed.starts), packed.count - len(packed.starts)
    if size < 0 or packed.count > MOST or not 0 <= packed.bits < 64:
        raise ValueError("no packed column")
    if packed.unary:
        ends = np.flatnonzero(np.unpackbits(np.frombuffer(packed.unary, np.uint8)))
        if ends.size != size:
            raise ValueError("a packed column of another length than it says")
        quotients = np.diff(ends, prepend=-1) - 1
        near = quotients < FAR
        zigzag = quotients.astype(np.uint64) << np.uint64(packed.bits)
        if packed.bits:
            low = np.unpackbits(np.frombuffer(packed.low, np.uint8), count=int(near.sum()) * packed.bits)
            weights = np.uint64(1) << np.arange(packed.bits, dtype=np.uint64)
            zigzag[near] |= low.reshape(-1, packed.bits).astype(np.uint64) @ weights
        zigzag[~near] = np.frombuffer(packed.far, "<u8")
        rest = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)
        rest = rest * packed.divisor + packed.middle
    else:
        rest = np.full(size, packed.middle, np.int64)
    for start in reversed(packed.starts[:order]):
        rest = np.cumsum(np.concatenate((np.array([start], np.int64), rest)))
    return rest


def _zigzag(values: Ints) -> _U64:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def _cost(values: Ints) -> float:
    """About the bits it takes: the size of what is left around the median."""
    if not values.size:
        return 0.0
    around = values - np.partition(values, values.size // 2)[values.size // 2]
    return float(np.log2(1.0 + _zigzag(around).astype(np.float64)).sum()) + 1.0


def _bits(zigzag: _U64) -> int:
    """How many low bits to keep as they are."""
    guess = int(np.partition(zigzag, zigzag.size // 2)[zigzag.size // 2]).bit_length()
    around = range(max(0, guess - 2), min(63, guess + 2) + 1)

    def cost(bits: int) -> int:
        quotients = zigzag >> np.uint64(bits)
        far = int((quotients >= FAR).sum())
        return zigzag.size * (bits + 1) + int(np.minimum(quotients, FAR).sum()) + far * 64

    return min(around, key=cost)
