"""Candidates as the tasks of one Slurm array."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.launch import slurm
from trainsys.launch.job import make
from trainsys.layout import Layout
from trainsys.sweep.config import SweepConfig
from trainsys.sweep.points import Candidate
from trainsys.sweep.store import Result, Store, ended_badly, measured
from trainsys.telemetry.run_data import load_run


def submit(sweep: SweepConfig, todo: list[Candidate], store: Store, *, dry_run: bool, detach: bool) -> int:
    """One array of all of ``todo``; the exit code of submitting or following it."""
    first = make(sweep.run, [*todo[0].overrides, f"telemetry.out={store.folder}"])
    runs = []
    for n, candidate in enumerate(todo):
        run = _placed(candidate, store, f"{sweep.name}-{n:04d}")
        try:
            Layout.of(run, first.world)
        except UserError as error:
            store.write(candidate, Result("refused", reason=" ".join(str(error).split())))
            continue
        runs.append(run)
    if not runs:
        return 0
    return slurm.launch(replace(first, runs=tuple(runs)), dry_run, detach)


def _placed(candidate: Candidate, store: Store, name: str) -> RunConfig:
    assert candidate.run is not None
    run, folder = candidate.run, store.of(candidate).resolve()
    return run.model_copy(
        update={
            "name": name,
            "telemetry": run.telemetry.model_copy(update={"out": str(folder / "runs")}),
            "checkpoint": run.checkpoint.model_copy(update={"folder": str(folder / "checkpoints")}),
        }
    )


def collect(todo: list[Candidate], store: Store, *, ended: bool) -> None:
    """Write down what finished; with ``ended``, that nothing runs any more, also what did not."""
    for candidate in todo:
        if store.result(candidate) is not None:
            continue  # refused when it was to be submitted
        runs = store.of(candidate) / "runs"
        result = measured(runs)
        if result is None and ended:
            result = _unfinished(runs)
        if result is not None:
            store.write(candidate, result)


def _unfinished(runs: Path) -> Result:
    """A task whose run has no summary: in the words of its ranks, if it left any."""
    folders = sorted(runs.glob("*/events"), key=lambda p: p.stat().st_mtime)
    if not folders:
        return Result("failed", reason="the task left nothing; see the job's logs")
    found = load_run(folders[-1].parent)
    return ended_badly(1, found.reason or f"the run was {found.status}")
