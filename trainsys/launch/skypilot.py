"""`trainsys launch --on skypilot`: a task file, started as a managed job, which SkyPilot starts again after preemption.

Fields: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

from typing import Any

from trainsys.errors import UserError
from trainsys.launch import job as jobs
from trainsys.launch.job import Job
from trainsys.launch.kubernetes import command
from trainsys.launch.manifest import config_text, dns_name, dump, refuse_slurm

_RUN = """\
export PET_NNODES=$SKYPILOT_NUM_NODES PET_NODE_RANK=$SKYPILOT_NODE_RANK PET_MASTER_PORT=29500
export PET_MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec python -m trainsys.launch.node
"""


def render(job: Job) -> str:
    """The task file. UserError where an accelerator is needed and not named."""
    launch, sky = job.first.launch, job.first.launch.skypilot
    if job.on_devices and not sky.accelerator:
        raise UserError("launch.skypilot.accelerator: name it, e.g. H100; or set train.device=cpu")
    refuse_slurm(job.first, "SkyPilot", "time")
    resources: dict[str, Any] = {
        **({"accelerators": f"{sky.accelerator}:{job.ranks_per_node}"} if sky.accelerator else {}),
        **({"infra": sky.infra} if sky.infra else {}),
        "use_spot": sky.use_spot,
        **({"image_id": f"docker:{launch.container}"} if launch.container else {}),
        "job_recovery": {"max_restarts_on_errors": launch.max_restarts},
    }
    setup = [*launch.setup, *([] if launch.container else ["pip install -e ."])]
    environment = {**launch.env, "PET_NPROC_PER_NODE": str(job.ranks_per_node)}
    if launch.interface:
        environment["TRAINSYS_INTERFACE"] = launch.interface
    document = {
        "name": dns_name(job.name),
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": resources,
        "envs": {**environment, "TRAINSYS_RUN": config_text(job.first)},
        **({"setup": "\n".join(setup) + "\n"} if setup else {}),
        "run": _RUN,
    }
    return dump(document)


def launch(job: Job, dry_run: bool) -> int:
    """Submit by ``sky jobs launch``; the exit code."""
    text = render(job)
    if dry_run:
        print(text, end="")
        return 0
    path = jobs.write(job, "task.yaml", text)
    command(job, "skypilot", ["sky", "jobs", "launch", "--yes", "--detach-run", str(path)])
    return 0
