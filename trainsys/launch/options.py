"""Which option of ``launch:`` each backend uses, as one table; what a backend does not use is refused, not ignored.

``python -m trainsys.launch.options`` prints the table of docs/launch.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import BaseModel

from trainsys.config.launch import LaunchConfig
from trainsys.config.run import RunConfig
from trainsys.config.secrets import MASK, assigned_secrets
from trainsys.errors import UserError

Backend = Literal["slurm", "jobset", "trainjob", "skypilot", "local"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TITLES: dict[Backend, str] = {
    "slurm": "Slurm",
    "jobset": "Kubernetes (JobSet)",
    "trainjob": "Kubernetes (TrainJob)",
    "skypilot": "SkyPilot",
    "local": "this machine",
}

_SLURM: tuple[Backend, ...] = ("slurm",)
_KUBERNETES: tuple[Backend, ...] = ("jobset", "trainjob")
_SKYPILOT: tuple[Backend, ...] = ("skypilot",)
_SCHEDULERS = (*_SLURM, *_KUBERNETES, *_SKYPILOT)

USED: dict[str, tuple[Backend, ...]] = {
    "nodes": _SCHEDULERS,
    "devices_per_node": BACKENDS,
    "cpus_per_rank": _SCHEDULERS,
    "memory": _SCHEDULERS,
    "time": (*_SLURM, *_KUBERNETES),
    "warn_s": _SLURM,
    "max_restarts": _SCHEDULERS,
    "retry_wait_s": (*_SLURM, "local"),
    "account": _SLURM,
    "partition": _SLURM,
    "qos": _SLURM,
    "constraint": _SLURM,
    "reservation": _SLURM,
    "exclude": _SLURM,
    "array_limit": _SLURM,
    "sbatch": _SLURM,
    "srun": _SLURM,
    "cpu_bind": _SLURM,
    "gpu_bind": _SLURM,
    "python": _SLURM,
    "venv": (*_SLURM, "local"),
    "container": _SCHEDULERS,
    "mounts": _SLURM,
    "setup": BACKENDS,
    "env": BACKENDS,
    "interface": _SCHEDULERS,
    "port": (*_SLURM, "jobset", *_SKYPILOT),
    "snapshot": _SLURM,
    "preflight": _SLURM,
    "cluster": BACKENDS,
    "evict_share": _SLURM,
}
"""Backends that use an option. Options of a section that bears a backend's name are that backend's."""

SECTIONS: dict[str, tuple[Backend, ...]] = {"kubernetes": _KUBERNETES, "skypilot": _SKYPILOT}
_ONLY: dict[str, tuple[Backend, ...]] = {"kubernetes.runtime": ("trainjob",)}

_INSTEAD: dict[str, dict[Backend, str]] = {
    "nodes": {"local": "set launch.nodes=1 to try it here"},
    "cpus_per_rank": {"local": "train.threads sets the threads of a rank"},
    "max_restarts": {"local": "resilience.max_restarts is the one of --on local"},
    "partition": dict.fromkeys(_KUBERNETES, "launch.kubernetes.queue names a queue"),
    "constraint": dict.fromkeys(_KUBERNETES, "launch.kubernetes.node_selector chooses nodes"),
    "exclude": dict.fromkeys(_KUBERNETES, "launch.kubernetes.affinity keeps off nodes"),
    "qos": dict.fromkeys(_KUBERNETES, "launch.kubernetes.priority_class sets the priority"),
    "warn_s": dict.fromkeys(_KUBERNETES, "resilience.grace_s is the time that a pod has to save"),
    "venv": dict.fromkeys((*_KUBERNETES, *_SKYPILOT), "launch.container holds the environment"),
    "mounts": {
        **dict.fromkeys(_KUBERNETES, "launch.kubernetes.claim and .volumes mount storage"),
        "skypilot": "launch.skypilot.storage and .volumes mount storage",
    },
    "port": {"trainjob": "Kubeflow Trainer sets it"},
    "snapshot": {
        **dict.fromkeys(_KUBERNETES, "the code is the image's"),
        "skypilot": "the folder that launch is called in is sent",
    },
}


def options() -> Iterator[str]:
    """Every option of ``launch:``, those of its sections by dotted name."""
    for name, field in LaunchConfig.model_fields.items():
        section = field.annotation
        if name in SECTIONS and isinstance(section, type) and issubclass(section, BaseModel):
            yield from (f"{name}.{inner}" for inner in section.model_fields)
        else:
            yield name


def used(option: str) -> tuple[Backend, ...]:
    """The backends that use ``option``."""
    section, dot, _ = option.partition(".")
    return _ONLY.get(option, SECTIONS[section]) if dot else USED[option]


def backend_of(run: RunConfig, on: str) -> Backend:
    """The column for ``--on``, which has two for Kubernetes."""
    if on == "kubernetes":
        return run.launch.kubernetes.kind
    found: Backend = next(b for b in BACKENDS if b == on)
    return found


def check(run: RunConfig, on: Backend) -> None:
    """UserError for an option that is set to another value than its default and that ``on`` does not use.

    A section that bears the name of another backend is not read, so one file may hold the settings of several.
    """
    for name, field in LaunchConfig.model_fields.items():
        value = getattr(run.launch, name)
        if name in SECTIONS or on in USED[name] or value == field.get_default():
            continue
        instead = _INSTEAD.get(name, {}).get(on, "leave it out")
        raise UserError(f"launch.{name}={_shown(value)}: {TITLES[on]} does not use it; {instead}")
    if on != "local" and run.resilience.max_restarts:
        raise UserError(
            f"resilience.max_restarts={run.resilience.max_restarts}: it is for --on local; "
            "launch.max_restarts is the one of a scheduler"
        )
    for name in assigned_secrets([*run.launch.setup, *run.launch.sbatch, *run.launch.srun]):
        raise UserError(
            f"launch.setup, launch.sbatch, launch.srun: the value of {name} would be written into the run's files; set "
            f"launch.env.{name}, or read it where it is used: {name}=$(cat FILE)"
        )
    for name, text in run.launch.variables.items():
        if text == MASK:
            raise UserError(
                f"launch.env.{name}: its value is struck out in this file, as in all that trainsys writes; "
                f"give it again: launch.env.{name}=VALUE"
            )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table() -> str:
    """The table of docs/launch.md."""
    rows = [
        ["option of `launch:`", *(TITLES[b] for b in BACKENDS)],
        ["---"] * (1 + len(BACKENDS)),
        *([f"`{name}`", *("yes" if b in of else "refused" for b in BACKENDS)] for name, of in USED.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
