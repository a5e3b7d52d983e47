"""`trainsys launch --on skypilot`: a task file, started as a managed job, which SkyPilot starts again after preemption.

Fields: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainsys.config.secrets import is_secret
from trainsys.errors import UserError
from trainsys.launch import job as jobs
from trainsys.launch import options
from trainsys.launch.check import mounted, warn
from trainsys.launch.job import Job
from trainsys.launch.kubernetes import submit
from trainsys.launch.manifest import config_text, dump
from trainsys.launch.node import EXIT_DRAINED

_RUN = """\
export PET_NNODES=$SKYPILOT_NUM_NODES PET_NODE_RANK=$SKYPILOT_NODE_RANK PET_MASTER_PORT={port}
export PET_MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec python -m trainsys.launch.node
"""
_PORT = 29500
_GIB = {"": 1 / 1024, "K": 1 / 1024**2, "M": 1 / 1024, "G": 1, "T": 1024}


def render(job: Job) -> str:
    """The task file. UserError where an accelerator is needed and not named, or a recovered spot machine would find no
    checkpoint."""
    run, launch, sky = job.first, job.first.launch, job.first.launch.skypilot
    options.check(run, "skypilot")
    if job.on_devices and not sky.accelerator:
        raise UserError("launch.skypilot.accelerator: name it, e.g. H100; or set train.device=cpu")
    if sky.use_spot and not _keeps_checkpoints(job):
        raise UserError(
            f"launch.skypilot.use_spot=true: checkpoints go to {run.checkpoint_folder}, which is on no bucket or volume: "
            "a machine that replaces a preempted one would begin at step 0; set launch.skypilot.storage="
            "{/checkpoints: {name: BUCKET}} and checkpoint.folder=/checkpoints/RUN"
        )
    resources: dict[str, Any] = {
        **({"accelerators": f"{sky.accelerator}:{job.ranks_per_node}"} if sky.accelerator else {}),
        **({"infra": sky.infra} if sky.infra else {}),
        **({"cpus": f"{launch.cpus_per_rank * job.ranks_per_node}+"} if launch.cpus_per_rank else {}),
        **({"memory": f"{_gib(launch.memory)}+"} if launch.memory else {}),
        "use_spot": sky.use_spot,
        **({"image_id": f"docker:{launch.container}"} if launch.container else {}),
        # A run that was asked to stop has saved: it goes on, and costs none of the restarts.
        "job_recovery": {
            "max_restarts_on_errors": launch.max_restarts,
            "recover_on_exit_codes": [EXIT_DRAINED],
        },
    }
    setup = [*launch.setup, *([] if launch.container else ["pip install -e ."])]
    shown = {name: value for name, value in launch.variables.items() if name not in secrets(job)}
    environment = {**shown, "PET_NPROC_PER_NODE": str(job.ranks_per_node)}
    if launch.interface:
        environment["TRAINSYS_INTERFACE"] = launch.interface
    document = {
        "name": job.unique_name,
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": resources,
        **(
            {"file_mounts": {f: s.model_dump(exclude_none=True) for f, s in sky.storage.items()}}
            if sky.storage
            else {}
        ),
        **({"volumes": sky.volumes} if sky.volumes else {}),
        "envs": {**environment, "TRAINSYS_RUN": config_text(run)},
        **({"secrets": dict.fromkeys(secrets(job))} if secrets(job) else {}),
        **({"setup": "\n".join(setup) + "\n"} if setup else {}),
        "run": _RUN.format(port=launch.port or _PORT),
    }
    return dump(document)


def secrets(job: Job) -> dict[str, str]:
    """Variables whose values the task file leaves open: the client takes them from its own environment."""
    return {name: value for name, value in job.first.launch.variables.items() if is_secret(name, value)}


def _keeps_checkpoints(job: Job) -> bool:
    sky = job.first.launch.skypilot
    buckets = [folder for folder, storage in sky.storage.items() if storage.mode != "COPY"]
    return mounted(job.first.checkpoint_folder, [*buckets, *sky.volumes], None)


def _gib(memory: str) -> str:
    """Slurm's 200G as SkyPilot's number of GiB."""
    number = memory.rstrip("KMGT")
    return f"{int(number) * _GIB[memory[len(number) :]]:g}"


def launch(job: Job, dry_run: bool) -> int:
    """Submit by ``sky jobs launch``; the exit code."""
    text = render(job)
    if dry_run:
        print(text, end="")
    else:
        path = jobs.write(replace(job, code=None), "task.yaml", text)
        private = secrets(job)
        words = ["sky", "jobs", "launch", "--yes", "--detach-run"]
        submit(job, "skypilot", [*words, *(f"--secret={name}" for name in private), str(path)], private)
    if not _keeps_checkpoints(job):
        warn(
            f"checkpoints go to {job.first.checkpoint_folder}, which is on no bucket or volume: "
            "they end with the machine; set launch.skypilot.storage, and checkpoint.folder on it"
        )
    return 0
