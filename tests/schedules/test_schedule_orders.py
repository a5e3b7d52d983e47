"""The order of every schedule: possible, complete, equal to torch's where torch has it, with its known bubble."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from trainsys.errors import UserError
from trainsys.schedules import NAMES, Action, Schedule, Times, build, simulate
from trainsys.schedules.actions import check
from trainsys.schedules.build import problems, stages_per_rank


@st.composite
def possible(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(1, 8))
    micros = draw(st.integers(1, 24))
    virtual = draw(st.sampled_from([None, 1, 2, 3]))
    unit = draw(st.integers(1, 12)) if name == "blockwise" else None
    if any(problems(name, ranks, stages_per_rank(name, virtual), micros)):
        virtual, micros = None, 2 * ranks * draw(st.integers(1, 3))
    return build(name, ranks, micros, virtual, unit)


@settings(max_examples=60, deadline=None)
@given(possible())
def test_every_schedule_is_complete_and_possible(schedule: Schedule) -> None:
    # `build` checks too; here by the clock, on the definition itself.
    timeline = simulate(schedule, Times(1, 2, 3, send=0.5))
    at = {span.action: span for spans in timeline.ranks for span in spans}
    for stage in range(schedule.stages):
        for micro in range(schedule.micros):
            forward = at[Action("F", stage, micro)]
            back = at[schedule.gradient(stage, micro)]
            assert forward.end <= back.start
            if back.action.op == "I":
                assert back.end <= at[Action("W", stage, micro)].start
            if stage + 1 < schedule.stages:
                hop = 0.5 if schedule.rank_of(stage) != schedule.rank_of(stage + 1) else 0.0
                assert forward.end + hop <= at[Action("F", stage + 1, micro)].start
                assert at[schedule.gradient(stage + 1, micro)].end + hop <= back.start
    assert len(at) == sum(map(len, schedule.orders))
    for rank, spans in enumerate(timeline.ranks):
        assert {schedule.rank_of(s.action.stage) for s in spans} == {rank}
        assert all(a.end <= b.start for a, b in pairwise(spans))


@settings(max_examples=60, deadline=None)
@given(possible(), st.tuples(*[st.integers(1, 9)] * 3))
def test_nothing_is_faster_than_work_and_dependence_allow(
    schedule: Schedule, cost: tuple[int, int, int]
) -> None:
    timeline = simulate(schedule, Times(*cost))
    per_rank = sum(cost) * schedule.micros * schedule.stages / schedule.ranks
    first_micro = (cost[0] + cost[1]) * schedule.stages
    assert timeline.busy == pytest.approx([per_rank] * schedule.ranks)
    assert timeline.step_time >= max(per_rank, first_micro)
    assert 0 <= timeline.bubble < 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 32), st.integers(1, 9))
def test_bubble_of_gpipe_and_1f1b(name: str, ranks: int, micros: int, forward: int) -> None:
    timeline = simulate(build(name, ranks, micros), Times(forward, 2 * forward, 3))
    assert timeline.bubble == pytest.approx((ranks - 1) / (micros + ranks - 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 32))
def test_in_flight_of_gpipe_and_1f1b(ranks: int, micros: int) -> None:
    assert simulate(build("gpipe", ranks, micros), Times()).in_flight == (micros,) * ranks
    one = simulate(build("1f1b", ranks, micros), Times())
    assert one.in_flight == tuple(min(micros, ranks - s) for s in range(ranks)) == one.in_flight_rank


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(2, 4))
def test_interleaving_divides_the_bubble(ranks: int, rounds: int, virtual: int) -> None:
    # Narayanan et al. 2021, section 2.2.2: the time of the bubble is (p-1)(F+B)/v, in stages v times smaller.
    timeline = simulate(build("interleaved_1f1b", ranks, rounds * ranks, virtual), Times(1, 1, 1))
    assert timeline.step_time - timeline.busy[0] == pytest.approx((ranks - 1) * 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(2, 4))
def test_zero_bubble_keeps_what_1f1b_keeps_and_waits_a_third(ranks: int, rounds: int) -> None:
    # Qi et al. 2024, table 1: ZB-H1 waits (p-1)(F+I-W).
    timeline = simulate(build("zero_bubble", ranks, rounds * ranks), Times(1, 1, 1))
    assert timeline.step_time - timeline.busy[0] == pytest.approx(ranks - 1)
    assert max(timeline.in_flight_rank) <= ranks
    shorter = simulate(build("zbv", ranks, rounds * ranks), Times(0.5, 0.5, 0.5))
    assert shorter.step_time < timeline.step_time
    assert max(shorter.in_flight_rank) <= 2 * ranks


def test_blockwise_turns_to_another_stage_seldom() -> None:
    def turns(schedule: Schedule) -> int:
        stages = [a.stage for a in schedule.orders[0] if a.op != "W"]
        return sum(a != b for a, b in pairwise(stages))

    units = 2
    # Each unit passes 4 stages down and up; the last of one unit and direction is the first of the next.
    assert turns(build("blockwise", 4, 16, 4, 8)) == units * 2 * 3
    assert turns(build("interleaved_1f1b", 4, 16, 4)) > 40


# ---- against torch -----------------------------------------------------------------------------------

TORCH = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


def torch_order(name: str, rank: int, ranks: int, virtual: int, micros: int) -> list[str]:
    """What the class computes for one rank, without the stages and process groups that its constructor wants."""
    kind = TORCH[name]
    rounds = max(1, micros // ranks)
    fake: Any = SimpleNamespace(
        pp_group_size=ranks, n_local_stages=virtual, num_stages=ranks * virtual, rank=rank,
        number_of_rounds=rounds, microbatches_per_round=micros // rounds,
        _n_microbatches=micros, _num_stages=ranks, _stages=[None] * virtual,
    )  # fmt: skip
    if name in ("gpipe", "1f1b"):
        actions = kind._get_pipeline_order(fake)[rank]
    else:
        actions = kind._calculate_single_rank_operations(fake, rank)
    flat = [sub for a in actions if a is not None for sub in (a.sub_actions or [a])]
    return [str(a) for a in flat if a.computation_type.value in "FBIW"]


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "micros"),
    [
        *(("gpipe", p, 1, m) for p in (2, 4) for m in (4, 7)),
        *(("1f1b", p, 1, m) for p in (2, 3, 4, 8) for m in (8, 11)),
        *(("interleaved_1f1b", p, v, m) for p in (2, 4) for v in (2, 3) for m in (4, 8, 12)),
        *(("zero_bubble", p, v, m) for p in (2, 4) for v in (1, 2, 3) for m in (4, 8)),
        *(("zbv", p, 2, m) for p in (2, 3, 4) for m in (2, 8, 13)),
        *(("dualpipev", p, 2, m) for p in (2, 3, 4) for m in (8, 11)),
    ],
)
def test_as_torch_orders_it(name: str, ranks: int, virtual: int, micros: int) -> None:
    schedule = build(name, ranks, micros, virtual)
    # torch 2.13 lists 1F1B's last rank from micro-batch 1 on; its runtime, which has no list, does as ours.
    ranks_listed = ranks - 1 if name == "1f1b" else ranks
    for rank, order in enumerate(schedule.orders[:ranks_listed]):
        assert [str(a) for a in order] == torch_order(name, rank, ranks, virtual, micros)


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "micros", "virtual", "says"),
    [
        ("zbv", 2, 4, 1, "zbv has exactly 2 a rank"),
        ("1f1b", 2, 4, 3, "1f1b has exactly 1 a rank; interleaved_1f1b and zero_bubble and blockwise take 3"),
        ("interleaved_1f1b", 2, 4, 1, "at least 2 stages a rank"),
        ("dualpipev", 4, 7, None, "needs at least 8 micro-batches per step, but there are 7"),
        ("interleaved_1f1b", 4, 9, None, "which 9 do not make; 8 or 12 micro-batches work"),
        ("2f2b", 4, 9, None, "schedule=2f2b: there are gpipe"),
    ],
)
def test_refusals(name: str, ranks: int, micros: int, virtual: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(name, ranks, micros, virtual)


def test_an_order_that_waits_for_ever_is_no_schedule() -> None:
    good = build("1f1b", 2, 2)
    order = list(good.orders[1])
    order[0], order[1] = order[1], order[0]
    with pytest.raises(AssertionError, match="waits for ever at"):
        Schedule("bad", 2, 2, 2, "loop", (good.orders[0], tuple(order)))
    with pytest.raises(AssertionError, match="stage 1, micro-batch 1"):
        Schedule("short", 2, 2, 2, "loop", (good.orders[0], good.orders[1][:-1]))
    check(good)
