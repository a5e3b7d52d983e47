"""A run as a job for a scheduler: checked here, and all that it needs written into one folder.

``runs/jobs/NAME-20250131-142501/`` holds the resolved config of each task, the job file, a copy of the code and,
later, the logs: a job that is started again in a week still runs what was submitted.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainsys
from trainsys.config.launch import LaunchConfig
from trainsys.config.loader import load_run, resolved_yaml
from trainsys.config.root import config_root
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.launch.manifest import dns_name
from trainsys.launch.paths import inputs
from trainsys.layout import Layout

RECORD = "job.json"
ENV_FILE = "env.sh"
"""Sourced by the job script: the values of ``launch.env``, which no other file holds."""


@dataclass(frozen=True)
class Job:
    """Tasks of one shape: ``runs`` has one config, or one for each point of a grid."""

    runs: tuple[RunConfig, ...]
    nodes: int
    ranks_per_node: int
    folder: Path
    python: str
    code: Path | None = field(default=None)
    """The copied package's parent, for PYTHONPATH; None: what is installed."""

    @property
    def first(self) -> RunConfig:
        return self.runs[0]

    @property
    def name(self) -> str:
        return self.first.name if len(self.runs) == 1 else self.first.name.rpartition("-")[0]

    @property
    def unique_name(self) -> str:
        """The name of this submission with a cluster: a pod's, with its indices, may be 63 characters long."""
        return f"{dns_name(self.name, 28)}-{self.folder.name[-len('YYYYmmdd-HHMMSS') :]}"

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def on_devices(self) -> bool:
        return self.first.train.device != "cpu"


def make(path: str, overrides: Sequence[str] = (), grid: Sequence[str] = ()) -> Job:
    """The job for ``path``; ``grid`` has lines like ``optim.lr=1e-3,3e-4``, and every combination is a task.

    UserError where a config or a layout does not fit the nodes that ``launch:`` asks for.
    """
    points = _points(grid)
    runs = []
    for number, point in enumerate(points):
        run = load_run(path, [*overrides, *point])
        if len(points) > 1:
            run = run.model_copy(update={"name": f"{run.name}-{number:04d}"})
        runs.append(run)
    launch = runs[0].launch
    each = _ranks_per_node(runs[0])
    for run, point in zip(runs, points, strict=True):
        if run.launch != launch or run.train.device != runs[0].train.device:
            raise UserError(
                f"--grid {' '.join(point)}: the tasks of one job ask for the same nodes and devices"
            )
        try:
            Layout.of(run, launch.nodes * each)
        except UserError as error:
            where = f"launch.nodes={launch.nodes}, {each} ranks a node"
            raise UserError(f"{where}{': ' + ' '.join(point) if point else ''}: {error}") from None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = runs[0].name if len(runs) == 1 else runs[0].name.rpartition("-")[0]
    folder = Path(os.path.abspath(runs[0].telemetry.out)) / "jobs" / f"{name}-{stamp}"
    return Job(
        tuple(runs),
        launch.nodes,
        each,
        folder,
        interpreter(launch),
        folder / "code" if launch.snapshot else None,
    )


def interpreter(launch: LaunchConfig) -> str:
    """The Python that runs the ranks."""
    return f"{os.path.abspath(launch.venv)}/bin/python" if launch.venv else sys.executable


def settled(run: RunConfig) -> RunConfig:
    """``run`` as it means the same on any node and in any folder: every path absolute, and devices not optional.

    A job was given nodes with devices: a rank that finds none must not go on without.
    """
    checkpoint, data = run.checkpoint, run.data
    paths: dict[str, dict[str, str | None]] = {
        "telemetry": {"out": os.path.abspath(run.telemetry.out)},
        "checkpoint": {
            "folder": os.path.abspath(run.checkpoint_folder),
            "memory_dir": os.path.abspath(checkpoint.memory_dir),
            **({"local_dir": os.path.abspath(checkpoint.local_dir)} if checkpoint.local_dir else {}),
        },
        "data": {"cache_dir": os.path.abspath(data.cache_dir)} if data.cache_dir else {},
        "launch": {"cluster": _if_there(run.launch.cluster) if run.launch.cluster else None},
        "train": {"device": "cuda" if run.train.device == "auto" else run.train.device},
    }
    for key, text in inputs(run).items():
        section, _, name = key.partition(".")
        if key != "data.path":
            paths[section][name] = _if_there(text)
        elif data.source != "hf":  # a glob or a prefix is a path although nothing has just this name
            paths[section][name] = os.path.abspath(text)
    return run.model_copy(
        update={section: getattr(run, section).model_copy(update=keys) for section, keys in paths.items()}
    )


def _if_there(name: str) -> str:
    """A name that may be a path, absolute if it is one."""
    return os.path.abspath(name) if os.path.exists(name) else name


def template(name: str) -> str:
    """The text of a file of launchers/, in a checkout or an installed wheel."""
    return (config_root().parent / "launchers" / name).read_text(encoding="utf-8")


def write(job: Job, file: str, text: str, variables: Mapping[str, str] | None = None) -> Path:
    """Make the job's folder with its configs, its code and the job file ``file``; the job file's path.

    The folder is its owner's alone. ``variables``: values of ``launch.env``, for ``ENV_FILE`` and no other file.
    """
    folder = job.folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=False)
        (folder / "runs").mkdir()
        (folder / "logs").mkdir()
        if variables:
            with open(os.open(folder / ENV_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as env:
                env.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        for number, run in enumerate(job.runs):
            (folder / "runs" / f"{number}.yaml").write_text(resolved_yaml(run), encoding="utf-8")
        if job.code is not None:
            package = Path(trainsys.__file__).parent
            shutil.copytree(package, job.code / "trainsys", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / file).write_text(text, encoding="utf-8")
        (folder / file).chmod(0o700)
    except FileExistsError:
        raise UserError(f"{folder}: a job of this name was submitted this second; try again") from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; set telemetry.out to a folder that "
            "all nodes share and you may write to"
        ) from None
    return folder / file


def record(job: Job, on: str, identity: str) -> None:
    """``job.json``: what `trainsys jobs` reads."""
    kube = job.first.launch.kubernetes
    content: dict[str, Any] = {
        "on": on,
        "id": identity,
        "name": job.name,
        "submitted_s": time.time(),
        "nodes": job.nodes,
        "ranks": job.world,
        "tasks": len(job.runs),
        "namespace": kube.namespace,
        "kind": "trainjob,trainingruntime" if kube.kind == "trainjob" and not kube.runtime else kube.kind,
    }
    (job.folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _points(grid: Sequence[str]) -> list[list[str]]:
    axes = []
    for text in grid:
        key, equals, values = text.partition("=")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise UserError(f"--grid {text}: written section.key=value,value, like optim.lr=1e-3,3e-4")
        axes.append([f"{key}={value.strip()}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def _ranks_per_node(run: RunConfig) -> int:
    """What was asked for, else what the layout fixes, else the usual eight devices."""
    launch = run.launch
    if launch.devices_per_node is not None:
        return launch.devices_per_node
    required = Layout.required_world(run.parallel)
    if required is None:
        if run.train.device == "cpu":
            raise UserError(
                "launch.devices_per_node: needed, since neither the layout nor a device fixes the ranks"
            )
        return 8
    if required % launch.nodes:
        raise UserError(
            f"launch.nodes={launch.nodes}: the layout's {required} ranks do not divide among them; "
            "set launch.nodes to a divisor"
        )
    return required // launch.nodes
