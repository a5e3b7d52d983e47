from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import ParallelConfig, TrainConfig
from trainsys.errors import UserError
from trainsys.layout import AXES, PLACED, SIZED, Axis, Layout

SHARED_BY: dict[str, tuple[str, ...]] = {
    "dp": ("pp", "cp", "tp"),
    "fsdp": ("pp", "dp_replicate", "tp"),
    "loss": ("pp", "tp"),
    "world": (),
    **{axis: tuple(a for a in PLACED if a != axis) for axis in PLACED},
}
"""The coordinates that all ranks of one group have in common: the definition of each axis."""


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = {axis: draw(st.integers(1, 4)) for axis in PLACED}
    plane = sizes["dp_shard"] * sizes["cp"]
    ep = draw(st.sampled_from([n for n in range(1, plane + 1) if plane % n == 0]))
    return Layout(**sizes, ep=ep)


@settings(deadline=None)
@given(layouts())
def test_coordinates_count_up_with_tp_innermost(layout: Layout) -> None:
    expected = list(itertools.product(*(range(getattr(layout, axis)) for axis in PLACED)))
    assert [tuple(layout.coords(rank).values()) for rank in range(layout.world)] == expected
    assert tuple(layout.coords(0)) == PLACED
    assert all(layout.rank(**layout.coords(rank)) == rank for rank in range(layout.world))


@settings(deadline=None)
@given(layouts())
def test_groups_of_every_axis_partition_the_world(layout: Layout) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        assert {len(group) for group in groups} == {layout.size(axis)}
        for group in groups:
            assert group == sorted(group)
            for index, rank in enumerate(group):
                assert layout.group_of(axis, rank) == group
                assert layout.index(axis, rank) == index


@settings(deadline=None)
@given(layouts())
def test_a_group_is_the_ranks_that_share_the_other_coordinates(layout: Layout) -> None:
    for axis, shared in SHARED_BY.items():
        together: dict[tuple[int, ...], list[int]] = {}
        for rank in range(layout.world):
            at = layout.coords(rank)
            together.setdefault(tuple(at[name] for name in shared), []).append(rank)
        assert sorted(layout.groups(axis)) == sorted(together.values()), axis  # type: ignore[arg-type]


@settings(deadline=None)
@given(layouts(), st.data())
def test_groups_of_two_axes_meet_in_one_rank(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    disjoint: list[tuple[Axis, Axis]] = [*itertools.combinations(PLACED, 2), ("ep", "expert_fsdp")]
    for one, other in disjoint:
        assert set(layout.group_of(one, rank)) & set(layout.group_of(other, rank)) == {rank}


@settings(deadline=None)
@given(layouts())
def test_experts_share_the_ranks_of_dp_shard_and_cp(layout: Layout) -> None:
    assert layout.size("ep") * layout.size("expert_fsdp") == layout.size("fsdp")
    for plane in layout.groups("fsdp"):
        slices = [plane[i : i + layout.ep] for i in range(0, len(plane), layout.ep)]
        assert [layout.group_of("ep", group[0]) for group in slices] == slices
        for rank in plane:
            same_experts = [r for r in plane if layout.index("ep", r) == layout.index("ep", rank)]
            assert layout.group_of("expert_fsdp", rank) == same_experts


@settings(deadline=None)
@given(layouts())
def test_data_rank_numbers_the_ranks_that_read_different_rows(layout: Layout) -> None:
    seen = {}
    for rank in range(layout.world):
        at = layout.coords(rank)
        rows = (at["dp_replicate"], at["dp_shard"])
        assert seen.setdefault(rows, layout.data_rank(rank)) == layout.data_rank(rank)
    assert sorted(seen.values()) == list(range(layout.data_world))


@settings(deadline=None)
@given(layouts(), st.sampled_from(SIZED))
def test_minus_one_is_the_rest(layout: Layout, axis: str) -> None:
    sizes = {name: getattr(layout, name) for name in SIZED}
    expected = layout
    if axis == "ep":
        expected = replace(layout, ep=layout.dp_shard * layout.cp)
    parallel = ParallelConfig(**{**sizes, axis: -1})
    assert Layout.resolve(parallel, layout.world) == expected
    assert Layout.resolve(ParallelConfig(**sizes), layout.world) == layout
    assert Layout.required_world(ParallelConfig(**sizes)) == layout.world
    assert Layout.required_world(parallel) == (layout.world if axis == "ep" else None)


@settings(deadline=None)
@given(layouts(), st.integers(1, 200))
def test_a_world_that_does_not_fit_is_refused_with_worlds_that_do(layout: Layout, world: int) -> None:
    parallel = ParallelConfig(
        pp=layout.pp, dp_replicate=layout.dp_replicate, dp_shard=-1, cp=layout.cp, tp=layout.tp
    )
    fixed = layout.world // layout.dp_shard
    if world % fixed == 0:
        assert Layout.resolve(parallel, world).world == world
        return
    with pytest.raises(UserError) as caught:
        Layout.resolve(parallel, world)
    message = str(caught.value)
    assert "\n" not in message
    offered = re.search(r"start ((\d+)(?: or (\d+))?) ranks", message)
    assert offered
    for number in offered.groups()[1:]:
        if number:
            assert Layout.resolve(parallel, int(number)).world == int(number)
    if alternative := re.search(r"set parallel\.(\w+)=([\d, or]+)", message):
        for number in re.findall(r"\d+", alternative[2]):
            other = parallel.model_copy(update={alternative[1]: int(number)})
            assert Layout.resolve(other, world).world == world


@pytest.mark.parametrize(
    ("sizes", "world", "says"),
    [
        (
            {"dp_shard": 2, "tp": 2},
            8,
            r"dp_shard=2 × tp=2 is 4 ranks, but the world has 8; start 4 ranks, or",
        ),
        ({"dp_shard": 2, "tp": 3}, 4, r"6 ranks, but the world has 4; start 6 ranks$"),
        ({"dp_shard": -1, "tp": -1}, 4, r"parallel.dp_shard and parallel.tp are -1"),
        ({"dp_shard": -1, "ep": -1}, 4, r"parallel.dp_shard and parallel.ep are -1"),
        ({"tp": 0}, 4, r"parallel.tp=0: a size is 1 or more, or -1"),
        ({"ep": -2}, 4, r"parallel.ep=-2: a size is 1 or more, or -1"),
        ({"ep": 3}, 8, r"parallel.ep=3 does not divide .* = 8 × 1 = 8; ep can be 1, 2, 4 or 8"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], world: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Layout.resolve(ParallelConfig(**sizes), world)


def test_the_example_of_the_demo() -> None:
    layout = Layout.resolve(ParallelConfig(tp=2), 4)
    assert layout == Layout(dp_shard=2, tp=2)
    assert layout.groups("tp") == [[0, 1], [2, 3]]
    assert layout.groups("dp_shard") == [[0, 2], [1, 3]]
    assert [layout.data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_describe() -> None:
    parallel = ParallelConfig(tp=2)
    assert Layout(dp_shard=2, tp=2).describe(parallel) == "dp_shard=2 × tp=2 (+sp)"
    assert Layout(tp=2).describe(parallel.model_copy(update={"sequence_parallel": False})) == "tp=2"
    assert Layout(dp_shard=4, ep=2).describe() == "dp_shard=4, ep=2 within"
    assert Layout().describe(parallel) == "one process"


# ---- against a model, a batch and a cluster ----------------------------------------------------------

MODEL = ModelConfig(n_layers=6, d_model=96, n_heads=12, n_kv_heads=4, d_ff=256, vocab=320)
MOE = MODEL.model_copy(update={"moe": MoEConfig(n_experts=6, top_k=2, d_ff=64, n_shared_experts=1)})
TRAIN = TrainConfig(seq_len=96, global_batch=24, micro_batch=2)
SP, NO_SP = ParallelConfig(sequence_parallel=True), ParallelConfig(sequence_parallel=False)


@pytest.mark.parametrize(
    ("layout", "model", "train", "parallel", "says"),
    [
        (Layout(tp=8), MODEL, TRAIN, NO_SP, "tp=8 does not divide model.n_heads=12, model.n_kv_heads=4;"),
        (Layout(tp=8), MODEL, TRAIN, NO_SP, "tp can be 1, 2 or 4$"),
        (Layout(tp=2), MODEL.model_copy(update={"d_ff": 255}), TRAIN, SP, "model.d_ff=255"),
        (Layout(tp=2), MODEL.model_copy(update={"vocab": 259}), TRAIN, SP, "model.vocab=259"),
        (Layout(tp=4), MOE.model_copy(update={"moe": MoEConfig(n_experts=6, top_k=1, d_ff=6)}), TRAIN, SP,
         "model.moe.d_ff=6"),
        (Layout(tp=4), MODEL, TrainConfig(seq_len=90), SP, "seq_len=90 does not divide by parallel.tp=4"),
        (Layout(cp=4), MODEL, TrainConfig(seq_len=92), SP, "seq_len=92 .* 2 × parallel.cp=4; seq_len can be 88 or 96"),
        (Layout(cp=4, tp=4), MODEL, TrainConfig(seq_len=104), SP, "cp=4 × tp=4 .*; seq_len can be 96 or 112"),
        (Layout(pp=7), MODEL, TRAIN, SP, "parallel.pp=7 is more stages than model.n_layers=6 layers"),
        (Layout(dp_shard=5), MODEL, TRAIN, SP, "global_batch=24 .* 1 × 5 × 2 = 10; global_batch can be 20 or 30"),
        (Layout(dp_shard=4, ep=2), MODEL, TRAIN, SP, "parallel.ep=2 needs experts"),
        (Layout(dp_shard=4, ep=4), MOE, TRAIN, SP, "n_experts=6 does not divide by parallel.ep=4; ep can be 1 or 2"),
    ],
)  # fmt: skip
def test_what_does_not_divide(
    layout: Layout, model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        layout.validate(model, train, parallel)


def test_every_problem_is_its_own_line() -> None:
    with pytest.raises(UserError) as caught:
        Layout(tp=8, pp=7, dp_shard=5).validate(MODEL, TRAIN, NO_SP)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("layout", "model", "train", "parallel"),
    [
        (Layout(tp=4, cp=2, dp_shard=2, dp_replicate=3, pp=2), MODEL, TRAIN, SP),
        (Layout(dp_shard=6, ep=6), MOE, TRAIN, SP),
        (Layout(tp=4), MODEL, TrainConfig(seq_len=90), NO_SP),
    ],
)
def test_what_divides_passes(
    layout: Layout, model: ModelConfig, train: TrainConfig, parallel: ParallelConfig
) -> None:
    assert layout.validate(model, train, parallel) == []


@settings(deadline=None)
@given(
    heads=st.sampled_from([4, 6, 8, 12, 16]), groups=st.integers(1, 4), d_ff=st.integers(1, 40),
    vocab=st.integers(1, 60), tp=st.integers(1, 12),
)  # fmt: skip
def test_the_offered_tp_works(heads: int, groups: int, d_ff: int, vocab: int, tp: int) -> None:
    kv = heads // groups if heads % groups == 0 and heads % (heads // groups) == 0 else heads
    model = ModelConfig(
        n_layers=1, d_model=2 * heads, n_heads=heads, n_kv_heads=kv, d_ff=d_ff * 4, vocab=vocab * 4
    )
    fits = math.gcd(heads, kv, d_ff * 4, vocab * 4) % tp == 0
    try:
        Layout(tp=tp).validate(model, TRAIN, NO_SP)
        assert fits
    except UserError as error:
        assert not fits
        for works in re.findall(r"\d+", str(error).rpartition("tp can be")[2]):
            Layout(tp=int(works)).validate(model, TRAIN, NO_SP)


@dataclass
class Nodes:
    gpus_per_node: int


@pytest.mark.parametrize(
    ("layout", "node", "says"),
    [
        (Layout(tp=4), 2, "tp=4 is more than the 2 devices of a node"),
        (Layout(tp=4), 6, "tp=4 does not divide the 6 devices of a node"),
        (Layout(pp=4), 8, "n_layers=6 does not divide by parallel.pp=4: some stages hold one layer more, "),
    ],
)
def test_what_runs_but_hardly_as_meant_is_warned_of(layout: Layout, node: int, says: str) -> None:
    (warning,) = layout.validate(MODEL, TRAIN, SP, Nodes(node))
    assert says in warning
    for enough in (2, 8):
        assert Layout(tp=2, pp=2).validate(MODEL, TRAIN, SP, Nodes(enough)) == []


def test_axis_names() -> None:
    assert set(SHARED_BY) | {"ep", "expert_fsdp"} == set(get_args(Axis))
    with pytest.raises(KeyError, match="no axis 'dpp'"):
        Layout().groups("dpp")  # type: ignore[arg-type]
