"""Whatever the Megatron engine communicates is on its device: a run's only group may be NCCL's, which has no other."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.apart import apart
from support.placed import DEVICE, OnHost, device_alone

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="the extra megatron is not installed")
    import trainsys.engines.megatron  # noqa: F401

from engines.test_megatron import CASES  # isort: skip
from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.engines import build
from trainsys.engines.megatron import on_cpu
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline import stage
from trainsys.telemetry.recorder import Recorder, here


def _steps(cfg: RunConfig, judge: Any) -> tuple[int, list[float]]:
    """(collectives seen, losses) of two steps of one process whose ``cuda`` is the device."""
    warnings.simplefilter("ignore")
    on_cpu._CPU = DEVICE
    stage.to_device = lambda x, device: x.to(device)  # type: ignore[attr-defined]
    with device_alone() as placed:
        mesh = Mesh(Layout.resolve(cfg.parallel, 1), DEVICE)
        engine = build(cfg, mesh, Recorder(None, here(run_id="placed", rank=0, world=1), watch_gc=False))
        losses = []
        with Loader(build_source(cfg), mesh.layout, 0, cfg.train.micro_batch, prefetch=0) as loader:
            for step in range(2):
                result = engine.train_step(step, next(loader), judge)
                losses.append(float(result.scalars[0]))
        return placed.collectives, losses


@pytest.mark.parametrize("name", ["one process", "one process, other features", "one process, experts and bias"])
@pytest.mark.parametrize("judge", [None, lambda loss, norm: True], ids=["", "judged"])
def test_what_is_communicated_is_on_the_device(name: str, judge: Any) -> None:
    collectives, losses = apart(partial(_steps, CASES[name].config, judge))
    assert collectives > 0
    assert losses[0] != losses[1]


def _refused(make: str) -> str:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with device_alone():
        x = torch.ones(2, device=DEVICE) * 2
        dist.all_reduce(x)
        host = {"cpu": x.cpu, "new": lambda: torch.tensor([float(x.sum())])}[make]()
        try:
            dist.all_reduce(host)
        except OnHost as error:
            return str(error)
    return ""


@pytest.mark.parametrize("make", ["cpu", "new"])
def test_a_tensor_of_the_host_would_be_refused(make: str) -> None:
    assert "on the host" in apart(partial(_refused, make))
