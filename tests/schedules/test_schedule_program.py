"""Messages match and cannot deadlock; parameters are there when they are needed, and few of them at once."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule_orders import possible

from trainsys.schedules import Schedule
from trainsys.schedules.program import Compute, Exchange, Gather, Instruction, Reduce, Release, programs


def run_with_blocking_messages(schedule: Schedule, lists: list[list[Instruction]]) -> None:
    """The strictest transport there is: an exchange ends only when every peer has started its side of it, and a
    rank does nothing else meanwhile. Two ranks' messages must also come in the order they were sent."""
    at = [0] * schedule.ranks
    channels: dict[tuple[int, int], deque[tuple[bool, int, int]]] = {}
    waiting: list[list[tuple[int, int, tuple[bool, int, int], bool]]] = [[] for _ in lists]
    arrived: list[set[tuple[bool, int, int]]] = [set() for _ in lists]
    posted: dict[tuple[int, int, bool], deque[tuple[bool, int, int]]] = {}
    computed: set[tuple[bool, int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(lists):
            if at[rank] == len(program):
                continue
            item = program[at[rank]]
            if isinstance(item, Exchange):
                if not waiting[rank]:
                    for m in item.sends:
                        assert (m.forward, m.stage, m.micro) in computed, "sent before it is made"
                        posted.setdefault((rank, m.peer, True), deque()).append((m.forward, m.stage, m.micro))
                        waiting[rank].append((rank, m.peer, (m.forward, m.stage, m.micro), True))
                    for m in item.receives:
                        posted.setdefault((m.peer, rank, False), deque()).append(
                            (m.forward, m.stage, m.micro)
                        )
                        waiting[rank].append((m.peer, rank, (m.forward, m.stage, m.micro), False))
                    moved = True
                for source, to in {(s, t) for s, t, _, _ in waiting[rank]}:
                    sent, wanted = posted.get((source, to, True)), posted.get((source, to, False))
                    while sent and wanted:
                        key = sent.popleft()
                        assert key == wanted.popleft(), "another message than the one expected"
                        arrived[to].add(key)
                        channels.setdefault((source, to), deque()).append(key)
                left = [w for w in waiting[rank] if w[2] not in channels.get((w[0], w[1]), ())]
                if len(left) == len(waiting[rank]) and left:
                    continue
                waiting[rank] = left
                moved = True
                if left:
                    continue
            elif isinstance(item, Compute):
                for need in schedule.needs(item.action):
                    if schedule.rank_of(need.stage) != rank:
                        assert (need.op == "F", need.stage, need.micro) in arrived[rank], (
                            f"{item} has no input"
                        )
                if item.action.op != "W":
                    computed.add((item.action.op == "F", item.action.stage, item.action.micro))
            at[rank] += 1
            moved = True
    assert at == [len(p) for p in lists], "deadlock"


@settings(max_examples=60, deadline=None)
@given(possible())
def test_messages_match_and_cannot_deadlock(schedule: Schedule) -> None:
    lists = programs(schedule)
    sent = sum(len(i.sends) for p in lists for i in p if isinstance(i, Exchange))
    received = sum(len(i.receives) for p in lists for i in p if isinstance(i, Exchange))
    borders = sum(schedule.rank_of(s) != schedule.rank_of(s + 1) for s in range(schedule.stages - 1))
    assert sent == received == 2 * borders * schedule.micros
    run_with_blocking_messages(schedule, lists)


@settings(max_examples=60, deadline=None)
@given(possible(), st.integers(2, 4))
def test_parameters_are_gathered_when_needed_and_never_too_many(schedule: Schedule, room: int) -> None:
    for rank, program in enumerate(programs(schedule, room)):
        held: set[int] = set()
        reduced: set[int] = set()
        for item in program:
            if isinstance(item, Gather):
                assert item.stage not in held
                held.add(item.stage)
                assert len(held) <= room
            elif isinstance(item, Release):
                held.remove(item.stage)
            elif isinstance(item, Reduce):
                reduced.add(item.stage)
            elif isinstance(item, Compute):
                assert item.action.op == "W" or item.action.stage in held
                assert item.action.stage not in reduced, "a gradient after its reduction"
        assert reduced == set(schedule.stages_of(rank))


@settings(max_examples=60, deadline=None)
@given(possible())
def test_with_room_for_all_each_stage_is_gathered_once(schedule: Schedule) -> None:
    for rank, program in enumerate(programs(schedule)):
        gathered = [i.stage for i in program if isinstance(i, Gather)]
        assert sorted(gathered) == list(schedule.stages_of(rank))
        assert not any(isinstance(i, Release) for i in program)
