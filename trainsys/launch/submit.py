"""`trainsys launch --on` a scheduler: from a config to a job, and the job to its scheduler."""

from __future__ import annotations

from collections.abc import Sequence

from trainsys.errors import UserError
from trainsys.launch import options
from trainsys.launch.check import check_memory, check_paths
from trainsys.launch.job import make


def submit(
    on: str,
    path: str,
    overrides: Sequence[str],
    grid: Sequence[str],
    nproc: int | None,
    dry_run: bool,
    detach: bool,
) -> int:
    """Render the run's job for ``on``, print or submit it; the exit code."""
    if nproc is not None:
        raise UserError(
            "--nproc is for --on local; a job's ranks are launch.nodes and launch.devices_per_node"
        )
    job = make(path, overrides, grid)
    for run in job.runs:
        options.check(run, options.backend_of(run, on))
        # Of an image, or of a machine that is still to be rented, nothing is known here.
        if on == "slurm" and run.launch.container is None:
            check_paths(run)
        check_memory(run, job.world, run.launch.skypilot.accelerator if on == "skypilot" else None)
    if on == "slurm":
        from trainsys.launch import slurm

        return slurm.launch(job, dry_run, detach)
    if grid:
        raise UserError(f"--grid makes an array of Slurm; --on {on} starts one run")
    if on == "kubernetes":
        from trainsys.launch import kubernetes

        return kubernetes.launch(job, dry_run)
    from trainsys.launch import skypilot

    return skypilot.launch(job, dry_run)
