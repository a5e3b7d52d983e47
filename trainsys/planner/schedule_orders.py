"""The order in which each pipeline rank runs its work, for every schedule that torch.distributed.pipelining has.

An order is a list a rank of ``Op``: forward (F), full backward (B), and its halves, the gradient of the input (I) and of
the weights (W). ``p`` ranks, ``m`` micro-batches, ``v`` stages a rank. Stage s of a looped placement is on rank s mod p;
of a V placement rank r holds stages r and 2p-1-r. The orders equal those of torch 2.13 (tests compare them), with
its overlapped forward-backward pairs written as the F and the B they consist of.

GPipe: Huang et al. 2019. 1F1B and interleaved: Narayanan et al. 2021. Zero bubble and ZBV: Qi et al. 2023, 2024.
DualPipeV: DeepSeek-V3 report 2024, cut in half by Qi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from trainsys.errors import UserError

Kind = Literal["F", "B", "I", "W"]


class Op(NamedTuple):
    kind: Kind
    stage: int
    mb: int


Order = list[list[Op]]


class _Rank:
    """Writes one rank's list: counts micro-batches by kind and stage, and remembers weight gradients put off."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._next: dict[tuple[str, int], int] = {}
        self._late: list[tuple[int, int]] = []

    def add(self, kind: Kind, stage: int) -> None:
        """The next micro-batch of that kind and stage; I and B share one count."""
        key = ("F" if kind == "F" else "B", stage)
        mb = self._next.get(key, 0)
        self._next[key] = mb + 1
        self.ops.append(Op(kind, stage, mb))
        if kind == "I":
            self._late.append((stage, mb))

    def weights(self, most: int = 1) -> None:
        """Up to ``most`` of the weight gradients put off, oldest first."""
        for stage, mb in self._late[:most]:
            self.ops.append(Op("W", stage, mb))
        del self._late[:most]


def _gpipe(p: int, m: int, v: int) -> Order:
    order = []
    for r in range(p):
        stages = [r + i * p for i in range(v)]
        forward = [Op("F", s, b) for s in stages for b in range(m)]
        # One stage a rank goes back in order; the looped form (LoopedBFS) from the last micro-batch.
        back = range(m) if v == 1 else range(m - 1, -1, -1)
        order.append(forward + [Op("B", s, b) for s in reversed(stages) for b in back])
    return order


def _one_f_one_b(p: int, m: int, v: int) -> Order:
    assert v == 1
    order = []
    for r in range(p):
        rank, warm = _Rank(), min(p - 1 - r, m)
        for _ in range(warm):
            rank.add("F", r)
        for _ in range(m - warm):
            rank.add("F", r)
            rank.add("B", r)
        for _ in range(warm):
            rank.add("B", r)
        order.append(rank.ops)
    return order


def _looped(p: int, m: int, v: int, split: bool) -> Order:
    """Interleaved 1F1B; with ``split`` backward is halved and a rank's weight gradients lag its rank number behind."""
    rounds = max(1, m // p)
    if m % rounds:
        raise UserError(f"interleaved: {m} micro-batches over {p} ranks need m to divide by {rounds}; {m - m % rounds} would work")
    per_round = m // rounds
    order = []
    for r in range(p):
        rank = _Rank()
        total = v * m
        warm = min((v - 1) * per_round + (1 if split else 2) * (p - 1 - r), total)
        for step in range(total + warm):
            if step < total:
                rank.add("F", (step // per_round) % v * p + r)
            if step >= warm:
                done = step - warm
                rank.add("I" if split else "B", (v - 1 - (done // per_round) % v) * p + r)
                if split and done >= r:
                    rank.weights()
        rank.weights(total)
        order.append(rank.ops)
    return order


def _zbv(p: int, m: int, v: int) -> Order:
    assert v == 2
    order = []
    for r in range(p):
        rank, near, far = _Rank(), r, 2 * p - 1 - r
        # The order is laid out for enough micro-batches to fill the V, then those beyond m are dropped.
        n = max(2 * p - 1, m)
        forwards = {near: 0, far: 0}

        def forward(stage: int, rank: _Rank = rank, forwards: dict[int, int] = forwards) -> None:
            rank.add("F", stage)
            forwards[stage] += 1

        def backward(stage: int, rank: _Rank = rank) -> None:
            rank.add("I", stage)
            rank.weights()

        for _ in range(2 * (p - r) - 1):
            forward(near)
        for _ in range(r):
            forward(far)
            forward(near)
        for _ in range(p - r):
            forward(far)
            backward(far)
        while forwards[far] < forwards[near] or forwards[near] < n:
            if forwards[near] < n:
                forward(near)
            backward(near)
            forward(far)
            backward(far)
        late: dict[int, list[int]] = {near: [], far: []}
        for _ in range(r):
            for stage in (near, far):
                rank.add("I", stage)
                late[stage].append(rank.ops[-1].mb)
        for _ in range(p - r):
            rank.add("I", near)
            late[near].append(rank.ops[-1].mb)
            rank.ops.append(Op("W", near, late[near].pop(0)))
        rank.ops += [Op("W", stage, mb) for stage in (far, near) for mb in late[stage]]
        order.append([op for op in rank.ops if op.mb < m])
    return order


def _dualpipev(p: int, m: int, v: int) -> Order:
    assert v == 2
    if m < 2 * p:
        raise UserError(f"dualpipev: {m} micro-batches over {p} ranks; at least {2 * p} would work")
    order = []
    for r in range(p):
        rank, near, far = _Rank(), r, 2 * p - 1 - r
        for _ in range(2 * (p - r - 1)):
            rank.add("F", near)
        for _ in range(r + 1):
            rank.add("F", near)
            rank.add("F", far)
        for _ in range(p - r - 1):
            rank.add("I", far)
            rank.weights()
            rank.add("F", far)
        for _ in range(m - 2 * p + r + 1):
            rank.add("F", near)
            rank.add("B", far)
            rank.add("F", far)
            rank.add("B", near)
        for _ in range(p - r - 1):
            rank.add("B", far)
            rank.add("F", far)
            rank.add("B", near)
        # In the second half of what is left backward is halved, even ranks from the near stage, odd from the far one.
        half, split = (r + 1) // 2, False
        for i in range(r + 1):
            split = split or (i == half and r % 2 == 1)
            rank.add("I" if split else "B", far)
            split = split or (i == half and r % 2 == 0)
            rank.add("I" if split else "B", near)
        for _ in range(p - r - 1):
            rank.weights()
            rank.add("I" if split else "B", near)
        rank.weights(r + 1)
        order.append(rank.ops)
    return order


_ORDERS: dict[str, Callable[[int, int, int], Order]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved": lambda p, m, v: _looped(p, m, v, split=False),
    "zb1": lambda p, m, v: _looped(p, m, v, split=True),
    "zbv": _zbv,
    "dualpipev": _dualpipev,
}
V_SHAPED = ("zbv", "dualpipev")


def order(schedule: str, p: int, m: int, v: int = 1) -> Order:
    """Operations of each of ``p`` ranks.

    Raises:
        UserError: an unknown schedule, a count below 1, or numbers that the schedule cannot serve.
    """
    if schedule not in _ORDERS:
        raise UserError(f"schedule {schedule!r}: known are {', '.join(_ORDERS)}")
    if min(p, m, v) < 1:
        raise UserError(f"pipeline of {p} ranks, {m} micro-batches, {v} stages a rank: each at least 1")
    fixed = {"1f1b": 1, "zbv": 2, "dualpipev": 2}.get(schedule, v)
    if v != fixed:
        raise UserError(f"{schedule} has {fixed} stage{'s' if fixed > 1 else ''} a rank, not {v}")
    return _ORDERS[schedule](p, m, v)


def rank_of(schedule: str, stage: int, p: int) -> int:
    """Which rank holds a stage."""
    return min(stage, 2 * p - 1 - stage) if schedule in V_SHAPED else stage % p
