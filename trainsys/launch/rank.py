"""What ``srun`` starts: one rank. Slurm's variables become those that ranks read, then it trains.

Ranks started by srun need no agent: rank r is Slurm's task r, in the order of the nodes, so neighbours in the
layout are neighbours on the network; signals, exit codes and logs go straight between Slurm and the trainer.

usage: python -m trainsys.launch.rank COMMAND RUN.yaml        (COMMAND: train or preflight)
"""

from __future__ import annotations

import os
import runpy
import subprocess
from collections.abc import MutableMapping

from trainsys.errors import UserError
from trainsys.failure import guard
from trainsys.launch.network import settings

_FIRST_PORT, _PORTS = 15000, 12000  # below Linux's range for outgoing connections, 32768 on


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, MASTER_ADDR and the like in ``environment`` from what Slurm has set."""
    try:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = _of_step(environment, "NUM_TASKS", "NTASKS")
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["LOCAL_WORLD_SIZE"] = _tasks_here(environment)
        job, attempt = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
        step = int(environment.get("SLURM_STEP_ID", "0"))
        nodes = _of_step(environment, "NODELIST", "JOB_NODELIST")
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set; a rank is started by srun, see docs/slurm.md") from None
    # A rank left over from an attempt before, or one of another step of the job, must not meet this one.
    port = int(environment.get("TRAINSYS_PORT") or _FIRST_PORT + (job * 31 + attempt * 7 + step * 3) % _PORTS)
    settings(_first(nodes), port, environment.get("TRAINSYS_INTERFACE"), environment)


def adopt(environment: MutableMapping[str, str]) -> None:
    """Where a command for ranks was started by ``srun`` alone, prepare ``environment`` as :func:`prepare` does.

    UserError for one of several processes that no variable gives a place: each would be a run of its own, all of
    them in one folder.
    """
    if "RANK" in environment:
        return
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return prepare(environment)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if environment.get(name, "1") != "1":
            raise UserError(
                f"{name}={environment[name]}, but RANK is not set: each of these processes would be a run of its own; "
                "start the ranks by torchrun, by srun or by trainsys launch"
            )


def _of_step(environment: MutableMapping[str, str], name: str, of_job: str) -> str:
    """What srun says of this step, which may have fewer tasks and nodes than the job."""
    return environment.get(f"SLURM_STEP_{name}") or environment[f"SLURM_{of_job}"]


def _tasks_here(environment: MutableMapping[str, str]) -> str:
    """From ``2(x3),1``, Slurm's tasks by node: those of this node."""
    counts: list[str] = []
    for part in _of_step(environment, "TASKS_PER_NODE", "TASKS_PER_NODE").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[int(environment["SLURM_NODEID"])]


def _first(nodes: str) -> str:
    """The first name in Slurm's list: ``gpu[003-010]`` begins with gpu003."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        # In a container there is no scontrol.
        head, _, inside = nodes.partition("[")
        if "," in head:
            return head.split(",")[0]
        return head + inside.replace("]", ",").replace("-", ",").split(",")[0]


def main() -> None:
    """Prepare the environment, then run the command line in this process, as ``python -m trainsys`` would."""
    with guard():
        prepare(os.environ)
    # By name: the command line is a floor above, and this module is only what stands before it.
    runpy.run_module("trainsys", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
