"""From a sweep to its candidates: one resolved run for each point, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from typing import Any

from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.config.secrets import MASK, is_env, is_secret
from trainsys.config.text import flat
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.sweep.config import PlannedPoints, SweepConfig


@dataclass(frozen=True)
class Candidate:
    """``run`` None: ``refused`` says why it cannot run."""

    number: int
    key: str
    """of what is run: equal settings are one candidate, in whatever order points are listed"""
    point: dict[str, Any]
    overrides: tuple[str, ...]
    run: RunConfig | None
    refused: str = ""

    @property
    def label(self) -> str:
        """What sets it apart, in words."""
        said = [f"{k.rpartition('.')[2]}={v}" for k, v in self.point.items()]
        return " ".join(said) or "base"

    @property
    def slug(self) -> str:
        return f"{self.number:03d}-{self.key}"


def candidates(sweep: SweepConfig) -> list[Candidate]:
    """Without duplicates, in the order of the file. UserError where the base run or the planner cannot be read."""
    load_run(sweep.run, sweep.overrides)
    found: dict[str, Candidate] = {}
    for point in _points(sweep):
        made = _candidate(sweep, len(found), point)
        found.setdefault(made.key, made)
    return list(found.values())


def _points(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    if sweep.grid:
        for values in product(*sweep.grid.values()):
            yield dict(zip(sweep.grid, values, strict=True))
    yield from sweep.points
    if sweep.plan is not None:
        yield from _planned(sweep, sweep.plan)


def _planned(sweep: SweepConfig, plan: PlannedPoints) -> Iterator[dict[str, Any]]:
    from trainsys.planner.cluster import load_cluster
    from trainsys.planner.main import winner, world_of
    from trainsys.planner.search import search
    from trainsys.planner.space import Job, parse_limits

    run, cluster = load_run(sweep.run, sweep.overrides), load_cluster(plan.cluster)
    job = Job.of(run, cluster.machine(), world_of(cluster, plan.gpus))
    found = search(job, parse_limits(plan.limits), plan.margin)
    for i in found.distinct(plan.top):
        yield flat(winner(found, i))



def _candidate(sweep: SweepConfig, number: int, point: dict[str, Any]) -> Candidate:
    fixed = (
        f"train.steps={sweep.steps}",
        # A sweep measures: nothing to save, nothing to go on from.
        "checkpoint.every=0",
        "checkpoint.every_minutes=0",
        "checkpoint.resume=never",
        f"telemetry.wandb.group={sweep.name}",
    )
    mine = [
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in point.items()
    ]
    overrides = (*sweep.overrides, *mine, *fixed)
    point = {key: MASK if is_env(f"{key}=") and is_secret(key) else value for key, value in point.items()}
    try:
        run = load_run(sweep.run, overrides)
    except UserError as error:
        return Candidate(
            number, _key(json.dumps(point, sort_keys=True)), point, overrides, None, _line(error)
        )
    # A dump strikes out the values of launch.env, by which candidates may differ.
    variables = json.dumps(run.launch.variables, sort_keys=True) if run.launch.env else ""
    key = _key(json.dumps(run.model_dump(mode="json"), sort_keys=True) + variables)
    try:
        world = Layout.required_world(run.parallel) or sweep.ranks
        if world is not None:
            Layout.of(run, world)
    except UserError as error:
        return Candidate(number, key, point, overrides, None, _line(error))
    return Candidate(number, key, point, overrides, run)


def _line(error: UserError) -> str:
    return " ".join(str(error).split())


def _key(text: str) -> str:
    return blake2b(text.encode(), digest_size=4).hexdigest()
