"""Run a pipeline's order on paper: when each operation starts, the bubble, and what is in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainsys.planner.schedule_orders import Op, Order, order, rank_of


@dataclass(frozen=True)
class Timed:
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """``ranks[r]``: operations of rank r with times, in seconds; ``span`` from first start to last end."""

    schedule: str
    ranks: list[list[Timed]]
    span: float

    def busy(self, rank: int) -> float:
        return sum(t.end - t.start for t in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """Share of rank time that is idle, mean over ranks."""
        return 1.0 - sum(self.busy(r) for r in range(len(self.ranks))) / (self.span * len(self.ranks))

    def in_flight(self, rank: int) -> int:
        """Most stage inputs a rank holds at once: from the start of F to the end of B, or of W where it is apart."""
        events = []
        for t in self.ranks[rank]:
            if t.op.kind == "F":
                events.append((t.start, 1))
            elif t.op.kind in "BW":
                events.append((t.end, -1))
        live = most = 0
        for _, change in sorted(events, key=lambda e: (e[0], e[1])):
            live += change
            most = max(most, live)
        return most


def _needs(op: Op, last: int) -> list[tuple[str, int, int]]:
    """What must have ended: (``F`` or ``B``, stage, micro-batch); an input gradient counts as ``B``."""
    if op.kind == "F":
        return [("F", op.stage - 1, op.mb)] if op.stage else []
    if op.kind == "W":
        return [("B", op.stage, op.mb)]
    own = [("F", op.stage, op.mb)]
    return own if op.stage == last else [*own, ("B", op.stage + 1, op.mb)]


def simulate(
    schedule: str,
    p: int,
    m: int,
    v: int = 1,
    *,
    forward: Sequence[float] | float = 1.0,
    backward_input: Sequence[float] | float = 1.0,
    backward_weight: Sequence[float] | float = 1.0,
    transfer: float = 0.0,
) -> Simulation:
    """Seconds of F, I and W (B is I + W) of each of the p*v stages, or one number for all; ``transfer``: seconds from
    one rank to another. Each rank runs its order strictly, each operation as soon as its inputs have arrived.

    Raises:
        UserError: see ``schedule_orders.order``.
    """
    return run(order(schedule, p, m, v), schedule, p, v, forward, backward_input, backward_weight, transfer)


def run(
    orders: Order,
    schedule: str,
    p: int,
    v: int,
    forward: Sequence[float] | float,
    backward_input: Sequence[float] | float,
    backward_weight: Sequence[float] | float,
    transfer: float,
) -> Simulation:
    """As ``simulate``, for any order."""
    stages = p * v

    def each(values: Sequence[float] | float) -> list[float]:
        found = [float(values)] * stages if isinstance(values, (int, float)) else [float(x) for x in values]
        assert len(found) == stages, (len(found), stages)
        return found

    f, i, w = each(forward), each(backward_input), each(backward_weight)
    seconds = {"F": f, "I": i, "W": w, "B": [a + b for a, b in zip(i, w, strict=True)]}
    ended: dict[tuple[str, int, int], float] = {}
    at = [0] * len(orders)
    free = [0.0] * len(orders)
    timed: list[list[Timed]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for r, ops in enumerate(orders):
            while at[r] < len(ops):
                op = ops[at[r]]
                needs = _needs(op, stages - 1)
                if any(n not in ended for n in needs):
                    break
                ready = max(
                    (ended[n] + (transfer if rank_of(schedule, n[1], p) != r else 0.0) for n in needs), default=0.0
                )
                start = max(free[r], ready)
                end = start + seconds[op.kind][op.stage]
                if op.kind != "W":
                    ended["F" if op.kind == "F" else "B", op.stage, op.mb] = end
                timed[r].append(Timed(op, start, end))
                free[r], at[r], moved = end, at[r] + 1, True
    assert all(at[r] == len(ops) for r, ops in enumerate(orders)), f"{schedule}: the order deadlocks"
    return Simulation(schedule, timed, max(free))
