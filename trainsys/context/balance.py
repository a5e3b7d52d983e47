"""Which places of a row each rank of a context-parallel group holds.

A shard is a few spans of consecutive places. `contiguous`: rank r of n holds the r-th of n chunks. Under a
causal mask the last rank then has n times the work of the first; `zigzag` cuts 2n chunks and gives rank r
the r-th from the front and the r-th from the back, which makes all equal (Llama 3, Dubey et al. 2024,
section 3.3.2; also Striped Attention's point, Brandon et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Literal

from trainsys.config.run import ContextConfig

Balance = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class Span:
    """``length`` consecutive places of the row from ``place``, held from ``at`` on in the rank's own tensor."""

    place: int
    at: int
    length: int


Shard = tuple[Span, ...]


def shard(seq: int, size: int, index: int, balance: Balance) -> Shard:
    """What rank ``index`` of ``size`` holds of a row of ``seq`` tokens."""
    pieces = 2 * size if balance == "zigzag" else size
    assert seq % pieces == 0, f"{seq} tokens in {pieces} chunks; Layout.validate should have refused"
    length = seq // pieces
    if balance == "contiguous" or size == 1:
        return (Span(index * seq // size, 0, seq // size),)
    return (Span(index * length, 0, length), Span((pieces - 1 - index) * length, length, length))


def piece(whole: Shard, size: int, index: int) -> Shard:
    """The ``index``-th of ``size`` equal pieces of a shard, in the order in which it is held."""
    held = sum(span.length for span in whole)
    assert held % size == 0, (held, size)
    start, stop = index * held // size, (index + 1) * held // size
    spans = []
    for span in whole:
        a, b = max(start, span.at), min(stop, span.at + span.length)
        if a < b:
            spans.append(Span(span.place + a - span.at, a - start, b - a))
    return tuple(spans)


def places(held: Shard) -> list[int]:
    """The place in the row of each token of a shard, in the order in which they are held."""
    return list(chain.from_iterable(range(s.place, s.place + s.length) for s in held))


@dataclass(frozen=True)
class ContextPlan:
    """How one context-parallel group of ``cp`` ranks is used, every default filled in.

    The group is a grid of ``heads`` × ``ring``: ranks that differ in the head index share tokens by an
    all-to-all over attention heads, ranks that differ in the ring index by moving queries or keys. All
    flavours but `two_d` use one of the two only. ``ring`` in turn is ``outer`` rings of ``inner`` ranks.
    """

    flavour: str
    cp: int
    heads: int
    ring: int
    inner: int
    head_first: bool
    balance: Balance

    @classmethod
    def resolve(cls, cfg: ContextConfig, cp: int) -> ContextPlan:
        """Call after `trainsys.context.refusals` has found nothing."""
        heads = {"ulysses": cp, "two_d": cfg.head_degree or 1}.get(cfg.flavour, 1)
        ring = cp // heads
        return cls(
            flavour=cfg.flavour,
            cp=cp,
            heads=heads,
            ring=ring,
            inner=cfg.inner_ring or ring,
            head_first=cfg.placement != "context_first",
            balance=cfg.balance or ("contiguous" if cfg.flavour in CONTIGUOUS_ONLY else "zigzag"),
        )

    @property
    def outer(self) -> int:
        return self.ring // self.inner

    def head_index(self, index: int) -> int:
        """Which share of the heads the rank at ``index`` of the group computes."""
        return index % self.heads if self.head_first else index // self.ring

    def ring_index(self, index: int) -> int:
        """Which shard of the row it computes them for."""
        return index // self.heads if self.head_first else index % self.ring

    def at(self, head: int, ring: int) -> int:
        """The inverse of the two."""
        return ring * self.heads + head if self.head_first else head * self.ring + ring

    def ring_shard(self, seq: int, ring_index: int) -> Shard:
        """What the ranks of one ring index hold together."""
        return shard(seq, self.ring, ring_index, self.balance)

    def shard(self, seq: int, index: int) -> Shard:
        """What the rank at ``index`` of the group holds outside attention."""
        return piece(self.ring_shard(seq, self.ring_index(index)), self.heads, self.head_index(index))


CONTIGUOUS_ONLY = ("ulysses", "dist_flash")
"""Flavours that are balanced by construction and need rows in order."""


def reach(plan: ContextPlan, seq: int, window: int | None) -> int:
    """Over how many ring neighbours a query can see back, 0 .. ring - 1.

    Only a contiguous cut keeps near tokens on near ranks; the first chunk's neighbour at the other end of a
    zigzag is always one step too many to stop early.
    """
    if window is None or plan.balance == "zigzag":
        return plan.ring - 1
    held = seq // plan.ring
    return min(plan.ring - 1, -(-(window - 1) // held))


def sequence_unit(cfg: ContextConfig, cp: int) -> tuple[int, str]:
    """What ``train.seq_len`` must be a multiple of, and the reason in words."""
    if cp == 1:
        return 1, ""
    if cfg.flavour in CONTIGUOUS_ONLY or cfg.balance == "contiguous":
        return cp, f"parallel.cp={cp}"
    # Also of a two_d grid: its ring of cp / head_degree takes 2 cp / head_degree chunks, cut head_degree times.
    return 2 * cp, f"2 × parallel.cp={cp}"
