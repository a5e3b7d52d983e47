"""Parts of a stage: weight gradients put off, refusals, what the recorder and the ledger see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.pipeline_cases import FSDP, TIED, Case
from support.ranks import run_ranks
from trainsys.comm import ops
from trainsys.config.run import PipelineConfig
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline import weights
from trainsys.telemetry.recorder import Recorder, here


@pytest.mark.parametrize("tied", [False, True])
def test_weight_gradients_put_off_are_those_of_autograd(tied: bool) -> None:
    cfg = Case("zbv", 2, model={"qkv_bias": True, "tied_embeddings": tied}).config.model
    tokens, positions = torch.randint(0, 72, (2, 16)), torch.arange(16).expand(2, 16)
    gradients: list[dict[str, torch.Tensor]] = []
    for split in (False, True):
        model = Decoder(cfg, compute_dtype=torch.float64).double()  # no rounding to hide behind
        init_weights(model, cfg, 0)
        later = weights.WeightGradients()
        if split:
            later.apply(model)
            later.defer = []
        for _ in range(2):  # the second adds up
            model(tokens, positions).square().sum().backward()
            if split:
                assert later.defer
                linears = [w for w, _, _ in later.defer]
                assert len(linears) == 7 * cfg.n_layers + 1
                weights.run(later.defer)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_the_first_half_computes_no_weight_gradient() -> None:
    cfg = Case("zbv", 2).config.model
    model = Decoder(cfg)
    init_weights(model, cfg, 0)
    later = weights.WeightGradients()
    later.apply(model)
    later.defer = []
    model(torch.randint(0, 72, (1, 8)), torch.arange(8)[None]).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if "norm" in n or "embed" in n}


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("1f1b", 5), "parallel.pp=5 is more stages than model.n_layers=4 layers; pp can be 1 to 4"),
        (Case("zbv", 4), "pp=4 × 2 virtual stages a rank is more stages than .* pp can be 1 to 2"),
        (
            Case("dualpipev", 2, {"dp_shard": 4}),
            r"at least 4 micro-batches per step, but there are 2 "
            r"\(train.global_batch=8 / \(dp_replicate × dp_shard × micro_batch = 4\) = 2 micro-batches\)",
        ),
        (Case("1f1b", 2, {"dp_shard": 16}), "global_batch=8 does not divide .* global_batch can be 16"),
        (
            Case("interleaved_1f1b", 2, train={"global_batch": 5}),
            "which 5 do not make; 4 or 6 micro-batches work",
        ),
        (Case("interleaved_1f1b", 2, pipeline={"virtual_stages": 1}), "interleaves at least 2 stages a rank"),
        (Case("zbv", 2, pipeline={"virtual_stages": 1}), "zbv has exactly 2 a rank"),
        (Case("1f1b", 2, pipeline={"unit": 4}), "unit=4 is for schedule=blockwise; 1f1b has none"),
        (
            Case("zero_bubble", 2, train={"compile": True}),
            "a compiled block cannot put off its weight gradients",
        ),
    ],
    ids=lambda c: c.id if isinstance(c, Case) else "",
)
def test_refusals(case: Case, says: str) -> None:
    cfg = case.config
    with pytest.raises(UserError, match=says):
        Layout.resolve(cfg.parallel, case.world).validate(cfg.model, cfg.train, cfg.parallel)


def test_schedules_and_options_that_do_not_exist_are_refused() -> None:
    for wrong in ({"schedule": "2f2b"}, {"virtual_stages": 0}, {"gathered_stages": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PipelineConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("zbv", 1), "parallel.pipeline is set but parallel.pp=1"),
        (Case("1f1b", 4, train={"global_batch": 2}), "2 micro-batches per step are fewer than parallel.pp=4"),
        (
            Case("1f1b", 2, {"dp_shard": 2, "fsdp": {"prefetch": 2}}),
            "a pipeline gathers parameters by its schedule",
        ),
        (Case("1f1b", 3, train={"global_batch": 3}), "n_layers=4 does not divide by parallel.pp=3"),
    ],
    ids=lambda c: c.id if isinstance(c, Case) else "",
)
def test_warnings(case: Case, says: str) -> None:
    cfg = case.config
    (warning,) = Layout.resolve(cfg.parallel, case.world).validate(cfg.model, cfg.train, cfg.parallel)
    assert says in warning


# ---- telemetry and bytes -----------------------------------------------------------------------------


def one_step_on_this_rank(case: Case) -> tuple[Any, dict[tuple[str, str], Any]]:
    cfg, rank = case.config, dist.get_rank()
    mesh = Mesh(Layout.resolve(cfg.parallel, case.world), torch.device("cpu"))
    recorder = Recorder(None, here(run_id="test", rank=rank, world=case.world), watch_gc=False)
    mesh.ledger.recorder = recorder
    engine = NativeEngine(cfg, mesh, recorder)
    mesh.ledger.reset()
    with Loader(build_source(cfg), mesh.layout, rank, cfg.train.micro_batch) as loader:
        recorder.begin()
        engine.train_step(0, next(loader))
    return recorder.end_step(0), mesh.ledger.traffic


@pytest.mark.timing
@pytest.mark.parametrize(
    "case", [Case("1f1b", 2, FSDP), Case("zbv", 4, model={"n_layers": 8})], ids=lambda c: c.id
)
def test_phases_sum_to_the_step_and_waiting_is_comm(case: Case) -> None:
    for step, _ in run_ranks(case.world, one_step_on_this_rank, case):
        assert sum(step.phases.values()) == pytest.approx(step.step_time_s, abs=1e-6)
        assert min(step.phases[name] for name in ("forward", "backward", "optimizer", "comm/pp")) > 0
        assert step.phases["other"] < 0.5 * step.step_time_s


@pytest.mark.parametrize(
    ("case", "hops"),
    [
        (Case("1f1b", 4), [1, 2, 2, 1]),
        (Case("interleaved_1f1b", 2), [3, 3]),
        (Case("zbv", 2), [2, 2]),
        (Case("1f1b", 2, {"tp": 2}), [1, 1, 1, 1]),
    ],
    ids=lambda c: c.id if isinstance(c, Case) else "",
)
def test_bytes_sent_are_activations_and_their_gradients(case: Case, hops: list[int]) -> None:
    """A hop: an edge between stages of two ranks, over which a rank sends one way in forward or in backward."""
    cfg = case.config
    hidden = 4 * cfg.train.micro_batch * cfg.train.seq_len * cfg.model.d_model // case.other.get("tp", 1)
    for (_, traffic), edges in zip(run_ranks(case.world, one_step_on_this_rank, case), hops, strict=True):
        assert traffic["pp", "send"].sent_bytes == edges * cfg.train.global_batch * hidden
        assert traffic["pp", "recv"].calls == edges * cfg.train.global_batch


def test_a_tied_embedding_is_summed_over_its_two_ranks_only() -> None:
    results = run_ranks(4, one_step_on_this_rank, Case("1f1b", 4, model=TIED))
    reduced = [("pp", "all_reduce") in traffic for _, traffic in results]
    assert reduced == [True, False, False, True]


def pair_then_halves_on_this_rank() -> list[float]:
    mesh = Mesh(Layout(pp=4), torch.device("cpu"))
    sums = []
    # The first has ranks that are in no group of two: they must take part in making it all the same.
    for blocks in ([[0, 3], [1], [2]], [[0, 1], [2, 3]]):
        x = torch.tensor([float(dist.get_rank())])
        sums.append(float(ops.all_reduce_(x, mesh.subgroup("pp", blocks))))
    return sums


def test_groups_made_after_a_pair_of_ranks_work() -> None:
    assert run_ranks(4, pair_then_halves_on_this_rank, timeout_s=30) == [[3, 1], [1, 1], [2, 5], [3, 5]]
