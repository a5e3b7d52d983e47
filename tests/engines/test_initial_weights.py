"""`train.init_from` by every engine: the checkpoint's weights, no moments, and the losses of the native engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from deepspeed_cases import pieces, start, steps, stop
from test_deepspeed_checkpoint import NATIVE, layered, of_engine

from support.parity import Pieces, Trace, assemble
from support.ranks import run_ranks
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.initial import load_weights, open_weights
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.run import RunConfig

CASES = {
    "deepspeed zero1": (2, "deepspeed", lambda: layered("zero1")),
    "deepspeed zero3": (2, "deepspeed", lambda: layered("zero3")),
    "megatron tp2": (2, "megatron", lambda: of_engine("megatron", tp=2)),
}


def save(cfg: RunConfig, root: str) -> Pieces:
    engine, mesh = start(cfg)
    steps(engine, mesh, 0, 3, Trace())
    header = {"layout": {}, "config": cfg.model_dump(mode="json")}
    saver = Saver(cfg.checkpoint, Folder(root), Ranks(), lambda: list(engine.state()), header)
    saver.save(Progress(3, 3, engine.updates))
    saver.close()
    return pieces(engine.parameters())


def begin(cfg: RunConfig, root: str) -> tuple[Pieces, list[float]]:
    engine, mesh = start(cfg)
    asked = cfg.train.model_copy(update={"init_from": root})
    load_weights(open_weights(cfg.model_copy(update={"train": asked}), Ranks()), engine)
    assert engine.updates == 0
    held, trace = pieces(engine.state()), Trace()
    steps(engine, mesh, 0, 3, trace)
    stop(engine)
    return held, trace.losses


@pytest.mark.parametrize("case", CASES)
def test_weights_begin_a_run_of_any_engine(tmp_path: Path, case: str) -> None:
    world, module, make = CASES[case]
    if importlib.util.find_spec(module) is None or importlib.util.find_spec("deepspeed") is None:
        pytest.skip(f"the {module} extra is not installed")
    saved = {name: data for name, _, _, data in run_ranks(1, save, NATIVE, str(tmp_path))[0]}
    want = run_ranks(1, begin, NATIVE, str(tmp_path))[0][1]
    by_rank = run_ranks(world, begin, make(), str(tmp_path), timeout_s=180)
    for name, data in assemble([held for held, _ in by_rank]).items():
        assert np.array_equal(data, np.zeros_like(data) if "@" in name else saved[name]), name
    np.testing.assert_allclose(by_rank[0][1], want, rtol=1e-5)
    assert max(want) - min(want) > 1e-3, "the losses do not move: this compares dead models"
