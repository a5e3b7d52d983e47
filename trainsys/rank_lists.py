"""Many numbers or names in a few characters: every line that lists ranks, nodes or their errors is bounded by these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MOST = 8
"""Ranges, or items, that a line shows before it counts the rest."""


def rank_numbers(ranks: Iterable[int], most: int = MOST) -> str:
    """``0-7, 9 and 16,371 more``: at most ``most`` ranges of consecutive numbers, in order, and how many are left."""
    numbers = sorted(set(ranks))
    ranges: list[tuple[int, int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], n
        else:
            ranges.append((n, n))
    shown, count = [], 0
    for first, last in ranges[:most]:
        count += last - first + 1
        shown.append(str(first) if first == last else f"{first}, {last}" if last == first + 1 else f"{first}-{last}")
    return ", ".join(shown) + (f" and {len(numbers) - count:,} more" if count < len(numbers) else "")


def ranks_named(ranks: Iterable[int], most: int = MOST) -> str:
    """``rank 3`` or ``ranks 0-7, 9 and 16,371 more``."""
    numbers = set(ranks)
    return f"rank{'s' * (len(numbers) != 1)} {rank_numbers(numbers, most)}"


def first_few(items: Iterable[str], most: int = MOST) -> str:
    """``a, b and 3 more``."""
    every = list(items)
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")


def by_text(said: Mapping[int, str], most: int = 4) -> str:
    """``ranks 0-63: disk full; rank 70: …``: ranks that say the same once, and no more than ``most`` different texts."""
    groups: dict[str, list[int]] = {}
    for rank, text in said.items():
        groups.setdefault(text, []).append(rank)
    shown = [f"{ranks_named(ranks)}: {text}" for text, ranks in list(groups.items())[:most]]
    left = sum(map(len, list(groups.values())[most:]))
    return "; ".join(shown) + (f"; and {left:,} more ranks" if left else "")
