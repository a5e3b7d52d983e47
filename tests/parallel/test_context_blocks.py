"""How partial results merge; who computes what for whom."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.ops.attention import reference_attention
from trainsys.ops.attention_partial import Partial
from trainsys.parallel.context.dist_flash import schedule


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 1000))
def test_parts_in_any_number_and_order_merge_to_the_whole(owner: list[int], seed: int) -> None:
    """Keys dealt out to four parts, some of which a query, or all, may not see at all."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 8, 2, 4, generator=g, dtype=torch.float64)
    sees = torch.rand(8, 8, generator=g) < 0.5
    sees[0] = False
    want, want_lse = reference_attention(q, k, v, sees)
    partial = Partial(q)
    for part in range(4):
        theirs = torch.tensor(owner) == part
        for rows in (slice(0, 3), slice(3, 8)):
            partial.merge(*reference_attention(q[:, rows], k, v, (sees & theirs)[rows]), rows)
    torch.testing.assert_close(partial.out, want)
    torch.testing.assert_close(partial.lse, want_lse)


@given(st.integers(2, 12), st.data())
def test_light_seq_computes_each_causal_pair_once_in_half_the_turns(size: int, data: st.DataObject) -> None:
    hops = data.draw(st.integers(0, size - 1))
    turns = [schedule(size, i, hops) for i in range(size)]
    done: Counter[tuple[int, int]] = Counter((i, i) for i in range(size))
    for index, mine in enumerate(turns):
        assert len(mine) == size // 2
        for t, turn in enumerate(mine):
            assert turn.keys_from is None or turn.help_for is None, "one block a turn"
            if turn.keys_from is not None:
                done[index, turn.keys_from] += 1
                assert turns[turn.keys_from][t].keys_to == index
            if turn.help_for is not None:
                done[turn.help_for, index] += 1
                assert turns[turn.help_for][t].helped_by == index
            if turn.keys_to is not None:
                assert turns[turn.keys_to][t].keys_from == index
            if turn.helped_by is not None:
                assert turns[turn.helped_by][t].help_for == index
    assert done == {(q, k): 1 for q in range(size) for k in range(q + 1) if q - k <= hops}
