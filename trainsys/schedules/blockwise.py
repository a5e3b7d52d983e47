"""A schedule for sharded parameters: units of micro-batches go through one stage after the other.

ZeroPP (Tang et al. 2024): within a unit a rank does all micro-batches of one stage before it turns to the
next, so that FSDP gathers a stage's parameters once a unit and direction instead of once a micro-batch, and
no more than two stages of a rank need be gathered at a time. Weight gradients, which need no parameters,
fill the waits: those at the head of a unit with what the unit before has left.
"""

from __future__ import annotations

from collections import deque

from trainsys.schedules.actions import Action, rank_of


def blockwise(ranks: int, stages: int, micros: int, unit: int) -> list[list[Action]]:
    """One order a rank. ``unit``: micro-batches that go through a stage at once at most; units are equal but for one."""
    n = -(-micros // unit)
    units = [range(micros * k // n, micros * (k + 1) // n) for k in range(n)]
    main = [
        [
            Action(op, stage, micro)
            for block in units
            for op in ("F", "I")
            for stage in range(rank, stages, ranks)[:: 1 if op == "F" else -1]
            for micro in block
        ]
        for rank in range(ranks)
    ]
    return _fill(main, ranks, stages, most_owed=unit * (stages // ranks))


def _fill(main: list[list[Action]], ranks: int, stages: int, most_owed: int) -> list[list[Action]]:
    """Put each W where its rank would otherwise wait, every action taking the same time.

    A rank that owes ``most_owed`` weight gradients pays one off first: they hold activations.
    """
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    todo = [deque(order) for order in main]
    owed: list[deque[Action]] = [deque() for _ in range(ranks)]
    now = [0] * ranks
    ended: dict[Action, int] = {}

    def starts(rank: int) -> int | None:
        """When the rank's next F or I can start; None: not known yet."""
        op, stage, micro = todo[rank][0]
        before = Action("F", stage - 1, micro) if op == "F" else Action("I", stage + 1, micro)
        if not 0 <= before.stage < stages:
            return now[rank]
        assert rank_of(stage, ranks, "loop") == rank
        return max(now[rank], ended[before]) if before in ended else None

    while any(todo) or any(owed):
        for rank in sorted(range(ranks), key=now.__getitem__):
            if not todo[rank] and not owed[rank]:
                continue
            start = starts(rank) if todo[rank] else None
            late = start is None or start > now[rank]
            if owed[rank] and (late or len(owed[rank]) >= most_owed):
                action, start = owed[rank].popleft(), now[rank]
            elif start is not None:
                action = todo[rank].popleft()
            else:
                continue
            orders[rank].append(action)
            now[rank] = ended[action] = start + 1
            if action.op == "I":
                owed[rank].append(Action("W", action.stage, action.micro))
            break
    return orders
