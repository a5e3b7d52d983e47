"""Bytes that one rank sends in the attention of one layer, by flavour: the formulas the ledger is held to.

Per micro-batch, without recomputation (a recomputed forward sends its part again). With B rows, a shard of
L tokens a ring member, H and K heads there, head size d, e bytes an element, and accumulators of a bytes:

    kv = 2 B L K d e    dkv = 2 B L K d a    q = B L H d e    dq = B L H d a    lse = B H L a

A rank of a ring of n sends, h = n - 1 (fewer under a window on contiguous shards, see `reach`):

    flavour     forward              backward
    all_gather  (n-1) kv             (n-1) kv + (n-1) dkv
    ring        h kv                 h kv + (h+1) dkv
    pass_q      h q + h (q + lse)    h (3q + lse) + (h+1) dq
    token_ring  h q + h (q + lse)    h (3q + lse) + h dq
    ulysses     (n-1)/n B L (2H + 2K') d e, K' = max(K, n), both ways

The ring's rows are Liu et al. 2023; what TokenRing (Wang et al. 2024) gains is that its two terms run in
opposite directions at once, so that each direction of a duplex link carries half. DistFlashAttention (Li et
al. 2023) differs by rank and is summed below: fewer bytes than the ring, as nobody sends keys that the
causal mask hides. LoongTrain (Gu et al. 2024) sends the double ring's bytes on H/heads heads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trainsys.context.balance import ContextPlan, reach


@dataclass(frozen=True)
class AttentionSize:
    """One attention call of one rank. ``seq`` is the whole row; heads are those of a tensor-parallel rank."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2
    accumulator_bytes: int = 4
    window: int | None = None


@dataclass(frozen=True)
class Sent:
    """Bytes by operation, as the ledger names them."""

    forward: Counter[str]
    backward: Counter[str]

    @property
    def total(self) -> int:
        return self.forward.total() + self.backward.total()


def sent_bytes(plan: ContextPlan, size: AttentionSize, index: int = 0) -> Sent:
    """What the rank at ``index`` of the context-parallel group sends."""
    n, h = plan.ring, reach(plan, size.seq, size.window)
    tokens = size.batch * size.seq // n
    heads, kv_heads = size.heads // plan.heads, max(size.kv_heads, plan.heads) // plan.heads
    kv, dkv = (
        2 * tokens * kv_heads * size.head_dim * e for e in (size.element_bytes, size.accumulator_bytes)
    )
    q, dq = (tokens * heads * size.head_dim * e for e in (size.element_bytes, size.accumulator_bytes))
    lse = tokens * heads * size.accumulator_bytes
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    match plan.flavour:
        case "all_gather":
            forward["all_gather"] = backward["all_gather"] = (n - 1) * kv
            backward["reduce_scatter"] = (n - 1) * dkv
        case "ring":
            forward["send_kv"] = backward["send_kv"] = h * kv
            backward["send_dkv"] = (h + 1) * dkv if h else 0
        case "pass_q" | "token_ring":
            forward["send_q"], forward["send_out"] = h * q, h * (q + lse)
            backward["send_q"] = h * (3 * q + lse)
            backward["send_dq"] = (h + (plan.flavour == "pass_q")) * dq if h else 0
        case "dist_flash":
            for t in range(1, n // 2 + 1):
                if t <= h and index + t < n:
                    forward["send_kv"] += kv
                    backward["send_kv"] += kv
                if t <= h and index >= t:
                    backward["send_dkv"] += dkv
                if n - t <= h and 2 * t != n:  # a helper's pair is n - t ranks apart
                    if index + t >= n:
                        forward["send_q"] += q
                        backward["send_q"] += 3 * q + lse
                    if index < t:
                        forward["send_out"] += q + lse
                        backward["send_dq"] += dq
        case "ulysses" | "two_d":
            if n > 1:
                inner, outer = plan.inner, plan.outer
                for way in (forward, backward):
                    way["send_kv_inner"] = outer * (inner - 1) * kv
                    way["send_kv_outer"] = (outer - 1) * kv
                backward["send_dkv_inner"] = outer * inner * dkv if inner > 1 else 0
                backward["send_dkv_outer"] = outer * dkv if outer > 1 else 0
            held = size.batch * size.seq // plan.cp
            spread = 2 * (size.heads + max(size.kv_heads, plan.heads))
            moved = held * spread * size.head_dim * size.element_bytes * (plan.heads - 1) // plan.heads
            forward["all_to_all"] = backward["all_to_all"] = moved
    return Sent(+forward, +backward)
