"""Every pipeline schedule, alone and with the other axes, trains as one process does."""

from __future__ import annotations

import pytest

from support.parity import assemble, check, train_on_this_rank
from support.pipeline_cases import DDP, EIGHT, FSDP, PLAIN_TP, TIED, TP, Case
from support.ranks import run_ranks
from support.rounding import distance
from trainsys.config.run import ParallelConfig
from trainsys.schedules import NAMES

STEPS = 2
ZERO1 = {"shard": {"optim": "over_replicas"}}
SPLITS = ("zero_bubble", "zbv", "dualpipev", "blockwise")


CASES = [
    *(Case(name, 2) for name in NAMES),
    *(Case(name, 2, FSDP) for name in NAMES),
    *(Case(name, 2, DDP) for name in NAMES),
    *(Case(name, 2, TP) for name in NAMES),
    *(Case(name, 4) for name in ("gpipe", "1f1b", "zero_bubble")),
    *(Case(name, 4, model=EIGHT) for name in ("interleaved_1f1b", "zbv", "dualpipev", "blockwise")),
    # More stages a rank, units, rounds that are no multiple of the ranks, fewer micro-batches than ranks.
    Case("interleaved_1f1b", 2, pipeline={"virtual_stages": 4}, model=EIGHT),
    Case("zero_bubble", 2, pipeline={"virtual_stages": 2}),
    Case("blockwise", 2, FSDP, {"virtual_stages": 4, "unit": 2}, EIGHT),
    Case("interleaved_1f1b", 2, FSDP, {"virtual_stages": 4}, EIGHT),
    Case("1f1b", 4, train={"global_batch": 3}),
    Case("zbv", 2, train={"global_batch": 1}),
    Case("1f1b", 2, model={"n_layers": 3}, train={"micro_batch": 2}),
    # Tied embeddings: over two ranks, on one, sharded, split.
    Case("1f1b", 2, FSDP, model=TIED),
    Case("zero_bubble", 4, model=TIED),
    Case("zbv", 2, TP, model=TIED),
    Case("zbv", 2, FSDP, model=TIED),
    Case("dualpipev", 2, DDP, model=TIED),
    # Recomputation, which must not meet the weight gradients twice.
    *(Case("1f1b", 2, FSDP, recompute=policy) for policy in ("selective", "full")),
    *(Case(name, 2, PLAIN_TP, recompute="full") for name in SPLITS),
    Case("zbv", 2, TP, recompute="every_n"),
    # Other models.
    Case("zero_bubble", 2, model={"qkv_bias": True}),
    Case("zbv", 2, TP, model={"ffn_kind": "gelu", "norm": "layernorm", "parallel_block": True}),
    Case("1f1b", 2, FSDP, train={"loss_chunk": 4}),
    Case("zbv", 2, TP, train={"loss_chunk": 4}, model=TIED),
    # Context, and three and four axes.
    Case("1f1b", 2, {"cp": 2}),
    Case("zbv", 2, {"cp": 2}),
    Case("1f1b", 2, {"dp_replicate": 2, "dp_shard": 2}, model=TIED),
    Case("zbv", 2, {"dp_shard": 2, "tp": 2}),
    Case("zero_bubble", 2, {"dp_replicate": 2, "tp": 2}),
    Case("dualpipev", 4, {"tp": 2}, model=EIGHT),
    Case("interleaved_1f1b", 2, {"cp": 2, "tp": 2}),
    Case("blockwise", 2, {"dp_shard": 2, "cp": 2}),
    # Without overlap of sends; with that of tensor parallelism.
    *(Case(name, 2, {"overlap": {"pipeline": False}}) for name in NAMES),
    Case("1f1b", 4, {"overlap": {"pipeline": False}}),
    Case("interleaved_1f1b", 4, {"overlap": {"pipeline": False}}, model=EIGHT),
    Case("1f1b", 2, {"tp": 2, "overlap": {"tensor": True}}),
    # Optimizer states over replicas too.
    Case("1f1b", 2, {**DDP, **ZERO1}),
    Case("zbv", 2, {**DDP, **ZERO1}, model=TIED),
    Case("1f1b", 2, {"dp_replicate": 2, "dp_shard": 2, **ZERO1}, model=TIED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_same_answer_as_one_process(case: Case) -> None:
    check(case.config, case.world, axes=case.axes, steps=STEPS)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_bf16_gradients_are_added_up_in_fp32(schedule: str) -> None:
    """Under FSDP gathered weights and their gradients are bf16. The same micro-batches without a pipeline are
    rounded alike one by one, and FSDP2 adds them up in fp32: sums of 32 in bf16 would be several times further off."""
    gradients = []
    for pp in (1, 2):
        case = Case(schedule, pp, FSDP, train={"dtype": "bf16", "global_batch": 64})
        cfg = case.config
        if pp == 1:
            cfg = cfg.model_copy(update={"parallel": ParallelConfig(dp_shard=2)})
        traces = run_ranks(case.world, train_on_this_rank, cfg, 1)
        gradients.append(assemble([trace.gradients[0] for trace in traces]))
    plain, piped = gradients
    gaps = {name: distance(piped[name], gradient) for name, gradient in plain.items()}
    assert max(gaps.values()) < 3e-3, gaps


def gathers(case: Case) -> int:
    """How often rank 0 used the fsdp axis in one step, whatever for."""
    calls: int = run_ranks(case.world, train_on_this_rank, case.config, 1)[0].calls["fsdp"]
    return calls


def test_parameters_are_gathered_once_however_many_micro_batches() -> None:
    few, many = (gathers(Case("1f1b", 2, FSDP, train={"global_batch": n})) for n in (4, 16))
    assert few == many
    # Two layers, and the embedding: each gathered once, reduced once.
    assert few == 2 * 3


def test_blockwise_gathers_once_a_unit_and_direction() -> None:
    def case(schedule: str, **unit: int) -> Case:
        return Case(schedule, 2, FSDP, {"virtual_stages": 4, **unit}, EIGHT, train={"global_batch": 16})

    units = [gathers(case("blockwise", unit=unit)) for unit in (8, 4, 2)]
    assert units[0] < units[1] < units[2] < gathers(case("interleaved_1f1b"))
