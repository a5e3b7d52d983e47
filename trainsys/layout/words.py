"""Numbers in words, for messages that say what would work."""

from __future__ import annotations

import math
from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(values: Iterable[int]) -> str:
    """1, 2 or 4"""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def around(value: int, unit: int) -> str:
    """The multiples of ``unit`` on both sides of ``value``."""
    below = value // unit * unit
    return listed(n for n in (below, below + unit) if n)


def ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
