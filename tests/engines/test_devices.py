"""Whatever the Megatron engine communicates is on its device: a run's only groups are NCCL's, which take nothing else."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torch.distributed as dist

from support.apart import apart
from support.placed import DEVICE, OnHost, device_alone
from support.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="the extra megatron is not installed")
    import trainsys.engines.megatron  # noqa: F401

from engines.test_megatron import CASES

from trainsys.config.run import RunConfig
from trainsys.data import Loader, build_source
from trainsys.dryrun.swap import swapped
from trainsys.engines import build
from trainsys.engines.megatron import on_cpu
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline import stage
from trainsys.telemetry.recorder import Recorder, here


def _accept(loss: float, norm: float) -> bool:
    return True


def _steps(cfg: RunConfig, judged: bool) -> tuple[int, list[float]]:
    """(collectives seen, losses) of two steps of a rank whose CUDA device is the one that CPUs play."""
    warnings.simplefilter("ignore")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with ExitStack() as stack:
        stack.enter_context(swapped(stage, "to_device", lambda x, device: x.to(device)))
        stack.enter_context(swapped(on_cpu, "_CPU", DEVICE))
        placed = stack.enter_context(device_alone())
        mesh = Mesh(Layout.resolve(cfg.parallel, world), DEVICE)
        engine = build(cfg, mesh, Recorder(None, here(run_id="placed", rank=rank, world=world), watch_gc=False))
        losses = []
        with Loader(build_source(cfg), mesh.layout, rank, cfg.train.micro_batch, prefetch=0) as loader:
            for step in range(2):
                result = engine.train_step(step, next(loader), _accept if judged else None)
                losses.append(float(result.scalars[0]))
        return placed.collectives, losses


ALONE = ("one process", "one process, other features", "one process, experts and bias")
TOGETHER = ("tp2", "tp2 sp", "pp2 interleaved", "ep2 bias", "dp2 plain optimizer")


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_what_megatron_communicates_is_on_the_device(name: str) -> None:
    case = CASES[name]
    if case.world == 1:
        seen = [apart(partial(_steps, case.config, True))]
    else:
        seen = run_ranks(case.world, _steps, case.config, False, timeout_s=240.0)
    for collectives, losses in seen:
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
