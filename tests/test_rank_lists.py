"""However many ranks, a line about them is short, and nothing is left out of the count."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from trainsys.rank_lists import by_text, first_few, rank_numbers, ranks_named

WORLD = 16_384


def test_ranges_and_what_is_left() -> None:
    assert rank_numbers([3]) == "3"
    assert rank_numbers([0, 1, 3]) == "0, 1, 3"
    assert rank_numbers([9, *range(8)]) == "0-7, 9"
    assert ranks_named(range(WORLD)) == f"ranks 0-{WORLD - 1}"
    assert ranks_named(range(0, WORLD, 2), most=2) == "ranks 0, 2 and 8,190 more"
    assert ranks_named([5]) == "rank 5"
    assert first_few(["a"] * 11) == "a, a, a, a, a, a, a, a and 3 more"


@given(st.sets(st.integers(0, WORLD - 1), min_size=1))
def test_every_rank_is_shown_or_counted(ranks: set[int]) -> None:
    text = rank_numbers(ranks)
    assert len(text) < 140
    shown, _, rest = text.partition(" and ")
    count = int(rest.removesuffix(" more").replace(",", "")) if rest else 0
    for part in shown.split(", "):
        first, _, last = part.partition("-")
        held = range(int(first), int(last or first) + 1)
        assert ranks.issuperset(held)
        count += len(held)
    assert count == len(ranks)


def test_errors_of_many_ranks_are_told_once_a_text() -> None:
    same = by_text(dict.fromkeys(range(WORLD), "/ckpt: No space left on device"))
    assert same == f"ranks 0-{WORLD - 1}: /ckpt: No space left on device"
    each = by_text({rank: f"/ckpt/rank_{rank:05d}: No space left" for rank in range(WORLD)})
    assert len(each) < 300
    assert re.search(r"; and 16,380 more ranks$", each)
