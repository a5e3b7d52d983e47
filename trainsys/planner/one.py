"""What the planner says of one run as it is configured, rather than of all that could be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainsys.config.run import RunConfig
from trainsys.flops import train_flops_per_token
from trainsys.layout import Layout
from trainsys.planner.cases import RECOMPUTES, SCHEDULES, Array, Cases
from trainsys.planner.constants import Constants, shipped
from trainsys.planner.machine import Machine
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.settings import CONFIG_NAMES
from trainsys.planner.space import Job, to_cases
from trainsys.planner.step_time import step_time
from trainsys.schedules.build import stages_per_rank

_PLANNED = {name: planned for planned, name in CONFIG_NAMES.items()} | {"blockwise": "interleaved"}


@dataclass(frozen=True)
class Predicted:
    step_time_s: float
    mfu: float
    """exact FLOPs over the dense 16-bit peak"""
    memory_bytes: float


def case_of(run: RunConfig, world: int, machine: Machine, stack: str | None = None) -> Cases:
    """The run's layout as a case of length 1. UserError where the layout does not resolve to ``world``."""
    layout, pipeline = Layout.resolve(run.parallel, world), run.parallel.pipeline
    schedule = _PLANNED.get(pipeline.schedule, pipeline.schedule) if layout.pp > 1 else "1f1b"
    columns: dict[str, Array] = {
        axis: np.array([float(getattr(layout, axis))])
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    }
    virtual = stages_per_rank(pipeline.schedule, pipeline.virtual_stages) if layout.pp > 1 else 1
    # Every n-th layer recomputed lies between none and all, as half of each layer does.
    policy = {"every_n": "half"}.get(run.recompute.policy, run.recompute.policy)
    for name, value in (
        ("micro_batch", run.train.micro_batch),
        ("vpp", virtual),
        ("schedule", SCHEDULES.index(schedule)),
        ("recompute", RECOMPUTES.index(policy)),
        ("reshard", run.parallel.fsdp.reshard_after_forward),
        ("reduce_each", layout.reduces_each_micro_batch(run.parallel)),
    ):
        columns[name] = np.array([float(value)])
    return to_cases(Job.of(run, machine, world, stack), columns)


def predict_run(run: RunConfig, world: int, machine: Machine, k: Constants | None = None) -> Predicted:
    """Step time, MFU and memory of ``run`` as configured, on ``world`` devices of ``machine``."""
    case = case_of(run, world, machine)
    seconds = float(np.ravel(step_time(case, k or shipped()).total)[0])
    flops = train_flops_per_token(run.model, run.train.seq_len) * run.train.global_batch * run.train.seq_len
    memory = float(np.ravel(peak_memory(case, shipped_memory()).total)[0])
    return Predicted(seconds, flops / (seconds * world * machine.peak_16), memory)
