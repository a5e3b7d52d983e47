"""Options of srun for a job in a container, by pyxis: what the run uses is mounted, and its environment wins.

https://github.com/NVIDIA/pyxis: where image and job both set a variable the image's value counts, unless the name is
in --container-env.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.launch.job import Job
from trainsys.launch.paths import inputs

_OURS = (
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "TRAINSYS_TASK",
    "TRAINSYS_FAILURE_FILE",
    "TRAINSYS_BLAME_FILE",
    "TRAINSYS_DONE_FILE",
)


def hosts_python(job: Job) -> bool:
    """Whether the ranks run the host's Python; the container's own one otherwise."""
    launch = job.first.launch
    if not launch.container:
        return True
    return launch.python == "host" or (launch.python is None and launch.venv is not None)


def options(job: Job) -> list[str]:
    """Options of srun; none without ``launch.container``. UserError for a folder that cannot be mounted."""
    launch = job.first.launch
    if not launch.container:
        return []
    mounts = [f"{path}:{path}" for path in _outermost(_used(job), launch.mounts)]
    return [
        f"--container-image={launch.container}",
        f"--container-mounts={','.join([*mounts, *launch.mounts])}",
        f"--container-workdir={job.folder}",
        f"--container-env={','.join([*_OURS, *launch.env])}",
    ]


def _used(job: Job) -> Iterator[Path]:
    yield job.folder
    for run in job.runs:
        yield from _of_run(run)
    if hosts_python(job):
        # A virtual environment's python is a link into the installation that it was made from.
        yield Path(job.python).parent.parent
        yield Path(os.path.realpath(job.python)).parent.parent


def _of_run(run: RunConfig) -> Iterator[Path]:
    yield Path(run.telemetry.out)
    yield Path(run.checkpoint_folder)
    if run.checkpoint.memory_every:
        yield Path(run.checkpoint.memory_dir)
    if run.checkpoint.local_dir:
        yield Path(run.checkpoint.local_dir).parent  # each node makes its own
    for name in (*inputs(run).values(), run.data.cache_dir):
        if name and os.path.isabs(name):
            yield _there(Path(name))


def _there(path: Path) -> Path:
    """The folder that a file, glob or prefix is in; a folder itself."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _outermost(paths: Iterator[Path], given: tuple[str, ...]) -> list[Path]:
    """Each folder once, without those inside of another one or of what the user mounts already."""
    mounted = [Path(mount.split(":")[1]) for mount in given if ":" in mount]
    found: list[Path] = []
    for path in sorted(set(paths), key=lambda p: len(p.parts)):
        if not any(path.is_relative_to(outer) for outer in [*mounted, *found]) and path != Path("/"):
            if {",", ":"} & set(str(path)):
                raise UserError(
                    f"{path}: a folder with a comma or a colon in its name cannot be mounted into a container"
                )
            found.append(path)
    return found
