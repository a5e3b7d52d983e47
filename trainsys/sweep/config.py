"""What a sweep is: a base run and the points at which it is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainsys.config.base import Strict
from trainsys.config.loader import load


class PlannedPoints(Strict):
    """The planner's best layouts as points."""

    cluster: str = Field(description="one of configs/clusters, or a file")
    gpus: PositiveInt | None = Field(None, description="devices, where the cluster file does not say")
    top: PositiveInt = Field(
        5, description="how many of the best, each of another pp, cp, tp, ep and micro-batch"
    )
    limits: tuple[str, ...] = Field((), description="such as 'tp<=4'")
    margin: float = Field(0.05, ge=0, lt=1, description="share of usable memory kept free")


class SweepConfig(Strict):
    """One file of ``configs/sweeps``. Points are all combinations of ``grid``, then ``points``, then the planner's."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: str = Field(description="the base RUN.yaml, by name or path; a path may be relative to this file")
    overrides: tuple[str, ...] = Field((), description="of the base run, as on the command line")
    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="section.key: values to combine"
    )
    points: tuple[dict[str, Any], ...] = Field((), description="single points: section.key: value")
    plan: PlannedPoints | None = None
    steps: PositiveInt = Field(20, description="steps of each run")
    ranks: PositiveInt | None = Field(None, description="processes of a run whose layout leaves it open")
    timeout_s: PositiveFloat = Field(1800.0, description="longest a run may take, on this machine")
    out: str = Field("runs/sweeps", description="holds one folder a sweep")

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if not (self.grid or self.points or self.plan):
            raise ValueError("no points: give grid, points or plan")
        empty = next((key for key, values in self.grid.items() if not values), None)
        if empty is not None:
            raise ValueError(f"grid.{empty} has no values")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


def load_sweep(path: str | Path) -> SweepConfig:
    """Raises UserError for a file that does not describe a sweep."""
    found = load(path, SweepConfig)
    beside = Path(path).parent / found.run
    return found.model_copy(update={"run": str(beside)}) if beside.is_file() else found
