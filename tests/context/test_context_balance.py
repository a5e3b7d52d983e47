"""Who holds what, which work that makes, and which pairs of ranks each schedule computes."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.config.run import ContextConfig
from trainsys.context.balance import ContextPlan, Shard, places, reach, sequence_unit
from trainsys.context.refusals import TABLE, Request, refusals
from trainsys.context.traffic import AttentionSize, sent_bytes

FLAVOURS = ("ring", "all_gather", "pass_q", "ulysses", "two_d", "dist_flash", "token_ring")


@st.composite
def configs(draw: st.DrawFn) -> tuple[ContextConfig, int]:
    flavour, cp = draw(st.sampled_from(FLAVOURS)), draw(st.integers(2, 12))
    options: dict[str, object] = {}
    if flavour == "two_d":
        heads = draw(st.sampled_from([d for d in range(1, cp + 1) if cp % d == 0]))
        ring = cp // heads
        options = {
            "head_degree": heads,
            "inner_ring": draw(st.none() | st.sampled_from([d for d in range(1, ring + 1) if ring % d == 0])),
            "placement": draw(st.sampled_from([None, "head_first", "context_first"])),
        }
    if flavour not in ("ulysses", "dist_flash"):
        options["balance"] = draw(st.sampled_from([None, "zigzag", "contiguous"]))
    return ContextConfig(flavour=flavour, **options), cp  # type: ignore[arg-type]


@given(configs(), st.integers(1, 3))
def test_shards_are_equal_and_cover_the_row(config: tuple[ContextConfig, int], factor: int) -> None:
    cfg, cp = config
    seq = factor * sequence_unit(cfg, cp)[0]
    plan = ContextPlan.resolve(cfg, cp)
    shards = [plan.shard(seq, i) for i in range(cp)]
    assert {len(places(s)) for s in shards} == {seq // cp}
    assert sorted(p for s in shards for p in places(s)) == list(range(seq))
    for index, held in enumerate(shards):
        assert [i for s in held for i in range(s.at, s.at + s.length)] == list(range(seq // cp))
        assert plan.at(plan.head_index(index), plan.ring_index(index)) == index
    for ring in range(plan.ring):
        together = [p for h in range(plan.heads) for p in places(shards[plan.at(h, ring)])]
        assert together == places(plan.ring_shard(seq, ring))


def _pairs(held: Shard) -> int:
    """(query, key) pairs that the queries of a shard see in a causal row."""
    return sum(p + 1 for p in places(held))


@given(st.integers(2, 16), st.integers(1, 4))
def test_zigzag_gives_all_ranks_the_same_work(cp: int, factor: int) -> None:
    plan = ContextPlan.resolve(ContextConfig(), cp)
    assert len({_pairs(plan.shard(2 * cp * factor, i)) for i in range(cp)}) == 1


@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 70))
def test_reach_is_how_far_back_any_query_sees(cp: int, length: int, window: int) -> None:
    seq = cp * length
    plan = ContextPlan.resolve(ContextConfig(balance="contiguous"), cp)
    far = max(q // length - max(0, q - window + 1) // length for q in range(seq))
    assert reach(plan, seq, window) == far
    assert reach(plan, seq, None) == cp - 1


def test_what_the_papers_claim_is_in_the_bytes() -> None:
    """Llama-3-8B's heads, 32k tokens over 8 ranks, bf16."""
    size = AttentionSize(batch=1, seq=32768, heads=32, kv_heads=8, head_dim=128)

    def sent(flavour: str, **options: object) -> list[tuple[Counter[str], Counter[str]]]:
        plan = ContextPlan.resolve(ContextConfig(flavour=flavour, **options), 8)  # type: ignore[arg-type]
        return [(s.forward, s.backward) for s in (sent_bytes(plan, size, i) for i in range(8))]

    kv = 2 * 4096 * 8 * 128 * 2
    assert sent("ring")[0][0] == {"send_kv": 7 * kv}
    # LightSeq: keys go only to later ranks, and no rank sends more than n/2 messages before the results.
    light = sent("dist_flash")
    assert [f["send_kv"] // kv for f, _ in light] == [4, 4, 4, 4, 3, 2, 1, 0]
    queries = 4096 * 32 * 128 * 2
    assert [f["send_q"] // queries for f, _ in light] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert sum(f["send_kv"] for f, _ in light) < sum(f["send_kv"] for f, _ in sent("ring")) / 2
    # TokenRing: what goes up the ring equals what goes down, but for the log-sum-exp.
    down, up = (sent("token_ring")[0][0][op] for op in ("send_q", "send_out"))
    assert down < up < down * 1.02
    # Ulysses: (n-1)/n of the local queries, keys, values and outputs; less than any ring for n > 2.
    assert sent("ulysses")[0][0].total() == (2 * queries + kv) * 7 // 8 < sent("ring")[0][0].total()
    # LoongTrain: heads shrink the ring's bytes; the double ring moves most of them inside a node.
    two_d = sent("two_d", head_degree=2, inner_ring=2)[0][0]
    assert two_d["send_kv_inner"] + two_d["send_kv_outer"] == 3 * kv
    assert two_d["send_kv_outer"] == kv


REFUSED = [
    (
        ContextConfig(flavour="ulysses", balance="zigzag"),
        4,
        8,
        8,
        "balance=zigzag does not go with flavour=ulysses",
    ),
    (ContextConfig(flavour="dist_flash", balance="zigzag"), 4, 8, 8, "does not go with flavour=dist_flash"),
    (ContextConfig(flavour="ring", head_degree=2), 4, 8, 8, "context.head_degree: only for flavour=two_d"),
    (ContextConfig(inner_ring=2, placement="head_first"), 4, 8, 8, "inner_ring, placement: only for"),
    (ContextConfig(flavour="two_d"), 6, 8, 8, "needs parallel.context.head_degree.* one of 1, 2, 3, 6"),
    (ContextConfig(flavour="two_d", head_degree=3), 4, 9, 9, "head_degree=3 does not divide parallel.cp=4"),
    (
        ContextConfig(flavour="ulysses"),
        8,
        12,
        4,
        "parallel.cp=8 ranks cannot share the 12 .* work: 1, 2, 4, 12;",
    ),
    (ContextConfig(flavour="two_d", head_degree=4), 8, 6, 6, "head_degree=4 ranks cannot share the 6"),
    (
        ContextConfig(flavour="ulysses"),
        4,
        12,
        6,
        "cp=4 neither divides nor is a multiple of the 6.* 1, 2, 3, 6, 12;",
    ),
    (
        ContextConfig(flavour="two_d", head_degree=2, inner_ring=3),
        8,
        8,
        8,
        "inner_ring=3 does not divide .* 1, 2, 4",
    ),
]


@pytest.mark.parametrize(("cfg", "cp", "heads", "kv_heads", "message"), REFUSED)
def test_each_refusal_names_the_reason_and_what_would_work(
    cfg: ContextConfig, cp: int, heads: int, kv_heads: int, message: str
) -> None:
    (line,) = refusals(Request(cfg, cp, heads, kv_heads))
    assert re.search(message, line), line
    assert "\n" not in line
    assert not list(refusals(Request(cfg, 1, heads, kv_heads))), "nothing is refused where there is no cp"


def test_every_row_of_the_table_is_tested() -> None:
    hit = {r.name for r in TABLE for cfg, cp, h, k, _ in REFUSED if r.applies(Request(cfg, cp, h, k))}
    assert hit == {r.name for r in TABLE}
