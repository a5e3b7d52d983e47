"""Under DeepSpeed a run gives the answer that one native process gives."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from deepspeed_cases import LAYOUTS, config, start, stop, train

from support.apart import apart
from support.parity import Trace, reference, whole
from support.ranks import run_ranks
from support.rounding import Reference
from trainsys.config.engines import DeepSpeedConfig
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.engines.base import StepResult
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the deepspeed extra is not installed"
)
STEPS = 20


def natively(layout: str, steps: int, **train: object) -> Reference:
    """What the same run gives in one native process."""
    cfg = config(layout, **{"loss_chunk": 0, **train})
    # All that would keep equal runs apart is back to its default, so that they are made once.
    return reference(cfg.model_copy(update={"engine": "native", "deepspeed": DeepSpeedConfig()}), steps)


@needs_deepspeed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_weights_are_those_of_one_process(layout: str) -> None:
    world, _, _, _, axes = LAYOUTS[layout]
    cfg = config(layout)
    got = whole(run_ranks(world, train, cfg, STEPS, timeout_s=120))
    want = natively(layout, STEPS)
    assert want.exact.losses[0] != want.exact.losses[1]
    assert all(np.any(gradient) for gradient in want.exact.gradients[0].values())
    want.check(replace(got, gradients=got.gradients[:1]))  # the others are not kept
    for trace in got.ranks:
        for axis in axes:
            assert trace.calls.get(axis, 0) >= STEPS, f"{axis} was not observed: {trace.calls}"
            assert trace.sent_bytes.get(axis, 0) > 0


@needs_deepspeed
@pytest.mark.parametrize("layout", ["zero2", "zero3", "tp and sp", "pp"])
def test_bf16_is_near_the_native_engine(layout: str) -> None:
    world = LAYOUTS[layout][0]
    cfg = config(layout, dtype="bf16")
    got = whole(run_ranks(world, train, cfg, 6))
    natively(layout, 6, dtype="bf16").check_losses(got.losses, got.norms)
    with pytest.raises(AssertionError, match="the loss of step"):  # or nothing was computed in bf16
        natively(layout, 6).check_losses(got.losses)


def refuse_some(layout: str) -> tuple[list[bool], Trace, list[float]]:
    """Three steps of which the second is turned down; and what a judge that always agrees is told."""
    cfg = config(layout)
    told: list[float] = []
    engine, mesh = start(cfg)
    applied, before = [], None
    trace = Trace()
    with Loader(build_source(cfg), mesh.layout, mesh.rank, cfg.train.micro_batch) as loader:
        for step in range(3):
            if step == 1:
                before = [t.data.clone() for t in engine.state()]

            def judge(loss: float, norm: float, step: int = step) -> bool:
                told.extend((loss, norm))
                return step != 1

            result: StepResult = engine.train_step(
                step, next(loader), judge, ask=float(mesh.rank == 0 and step == 2)
            )
            applied.append(result.applied)
            trace.losses.append(float(result.scalars[0]))
            trace.norms.append(float(result.asked))
            if step == 1:
                assert before is not None
                assert all(torch.equal(a, t.data) for a, t in zip(before, engine.state(), strict=True)), (
                    "an update that was turned down has changed something"
                )
                assert engine.updates == 1
    assert engine.updates == 2
    stop(engine)
    return applied, trace, told


@needs_deepspeed
@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero2", "zero3", "pp"])
def test_an_update_that_is_turned_down_changes_nothing(layout: str) -> None:
    for applied, trace, told in run_ranks(LAYOUTS[layout][0], refuse_some, layout):
        assert applied == [True, False, True]
        assert trace.norms == [0.0, 0.0, 1.0], "the wish to stop did not reach every rank"
        assert told[::2] == trace.losses


def poison(layout: str) -> tuple[bool, float, bool]:
    """A step whose gradients are not finite, then a good one."""
    cfg = config(layout)
    engine, mesh = start(cfg)
    with Loader(build_source(cfg), mesh.layout, mesh.rank, cfg.train.micro_batch) as loader:
        data = next(loader)
        weight = next(iter(engine.parameters()))
        kept = weight.data.clone()
        weight.data.fill_(float("nan"))
        engine.resumed(0)
        bad = engine.train_step(0, data, lambda loss, norm: bool(np.isfinite(loss) and np.isfinite(norm)))
        weight.data.copy_(kept)
        engine.resumed(0)
        good = engine.train_step(0, data, lambda loss, norm: bool(np.isfinite(loss) and np.isfinite(norm)))
    stop(engine)
    return bad.applied, float(good.scalars[0]), good.applied


@needs_deepspeed
@pytest.mark.parametrize("layout", ["zero0", "zero2", "zero3"])
def test_a_step_that_is_no_number_is_skipped(layout: str) -> None:
    want = natively(layout, STEPS)
    for bad, loss, good in run_ranks(LAYOUTS[layout][0], poison, layout):
        assert not bad
        assert good
        want.check_losses([loss])


def _absent() -> str:
    for name in list(sys.modules):
        if name.partition(".")[0] == "deepspeed" or name.startswith("trainsys.engines.deepspeed"):
            del sys.modules[name]
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    cfg = config("one process")
    mesh = Mesh(Layout.resolve(cfg.parallel, 1), torch.device("cpu"))
    try:
        build(cfg, mesh, Recorder(None, here(run_id="x", rank=0, world=1), watch_gc=False))
    except UserError as error:
        return str(error)
    return ""


def test_without_the_package_one_line_names_the_extra() -> None:
    told = apart(_absent)
    assert "pip install 'trainsys[deepspeed]', or engine=native" in told
    assert "\n" not in told
