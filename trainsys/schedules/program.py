"""From a schedule to what each rank executes: computation, messages, and gathering of sharded parameters.

**Messages.** Every rank starts its sends and receives in one common order, that of a nominal simulation in
which F, I and W take the same time. So no two ranks can wait for each other, even where a transport (NCCL)
runs a rank's messages one after the other. A receive is started before the computation during which its
message is sent, so that the transfer passes beside that computation.

**Parameters.** A stage sharded by FSDP is gathered when the rank turns to it and stays until the rank needs
the room: at most ``gathered`` stages at once (the one in use, and the next, on its way), the one that is
needed last leaves first, which is optimal (Belady 1966). Weight gradients need no parameters. Gradients
are reduced once, after the stage's last backward of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainsys.schedules.actions import Action, Schedule
from trainsys.schedules.simulate import Times, simulate


@dataclass(frozen=True)
class Message:
    """Activations (``forward``) from stage to the next, or their gradient from stage to the one before.

    ``stage`` and ``micro`` are those of the action that made it.
    """

    forward: bool
    stage: int
    micro: int
    peer: int
    """The pipeline rank at the other end."""


@dataclass(frozen=True)
class Compute:
    action: Action


@dataclass(frozen=True)
class Exchange:
    """Start these, all at once."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True)
class Gather:
    """Start gathering the stage's parameters; who computes with them waits."""

    stage: int


@dataclass(frozen=True)
class Release:
    stage: int


@dataclass(frozen=True)
class Reduce:
    """Start reducing the stage's gradients over the data ranks."""

    stage: int


Instruction = Compute | Exchange | Gather | Release | Reduce


def programs(schedule: Schedule, gathered: int | None = None) -> list[list[Instruction]]:
    """What each rank executes in one step.

    ``gathered``: stages whose parameters a rank may hold whole at once, at least 2; None: all of its stages.
    """
    messages = _messages(schedule)
    return [_program(schedule, rank, messages[rank], gathered) for rank in range(schedule.ranks)]


def _messages(schedule: Schedule) -> list[dict[int, Exchange]]:
    """By rank: what is started right before its n-th action (n = number of actions: after the last)."""
    timeline = simulate(schedule, Times())
    ends = [[span.end for span in spans] for spans in timeline.ranks]
    sent: list[tuple[float, Message, int]] = []
    for rank, spans in enumerate(timeline.ranks):
        for span in spans:
            op, stage, micro = span.action
            to = stage + 1 if op == "F" else stage - 1
            if op == "W" or not 0 <= to < schedule.stages or schedule.rank_of(to) == rank:
                continue
            sent.append((span.end, Message(op == "F", stage, micro, schedule.rank_of(to)), rank))
    sent.sort(key=lambda item: (item[0], item[1].stage, item[1].micro, item[1].forward))
    sends: list[dict[int, list[Message]]] = [{} for _ in schedule.orders]
    receives: list[dict[int, list[Message]]] = [{} for _ in schedule.orders]
    before = [0] * schedule.ranks
    for time, message, source in sent:
        for rank, lists, peer in ((source, sends, message.peer), (message.peer, receives, source)):
            # Time only grows from message to message, so this counts the actions that have ended by now.
            while before[rank] < len(ends[rank]) and ends[rank][before[rank]] <= time:
                before[rank] += 1
            lists[rank].setdefault(before[rank], []).append(
                replace(message, peer=peer)
            )
    return [
        {at: Exchange(tuple(s.get(at, ())), tuple(r.get(at, ()))) for at in s.keys() | r.keys()}
        for s, r in zip(sends, receives, strict=True)
    ]


def _program(
    schedule: Schedule, rank: int, exchanges: dict[int, Exchange], gathered: int | None
) -> list[Instruction]:
    order = schedule.orders[rank]
    parameters = _gathering(order, len(schedule.stages_of(rank)) if gathered is None else max(2, gathered))
    last = {a.stage: at for at, a in enumerate(order) if a.op in ("B", "W")}
    program: list[Instruction] = []
    for at in range(len(order) + 1):
        program += parameters.get(at, [])
        if at in exchanges:
            program.append(exchanges[at])
        # After the exchange: somebody waits for what is sent.
        program += [Reduce(stage) for stage, end in last.items() if end == at - 1]
        if at < len(order):
            program.append(Compute(order[at]))
    return program


def _gathering(order: tuple[Action, ...], room: int) -> dict[int, list[Instruction]]:
    """By the place in ``order`` before which they are done."""
    runs: list[tuple[int, int]] = []  # (first place, stage) of consecutive uses of one stage
    for at, action in enumerate(order):
        if action.op != "W" and (not runs or runs[-1][1] != action.stage):
            runs.append((at, action.stage))
    found: dict[int, list[Instruction]] = {}
    held: set[int] = set()
    for number, (at, stage) in enumerate(runs):
        # The stage that comes next is gathered while this one computes.
        for wanted in dict.fromkeys([stage, *(s for _, s in runs[number + 1 : number + 2])]):
            if wanted in held:
                continue
            if len(held) == room:
                later = [s for _, s in runs[number + 2 :]]
                others = held - {stage, wanted}
                leaves = max(others, key=lambda s: later.index(s) if s in later else len(later))
                held.remove(leaves)
                found.setdefault(at, []).append(Release(leaves))
            held.add(wanted)
            found.setdefault(at, []).append(Gather(wanted))
    return found
