"""`trainsys launch --on slurm`: the job script, its submission, and following it to its end.

The script is launchers/slurm/train.sbatch: its upper part is written here, the rest is the template's. Options of
sbatch: https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainsys.errors import UserError
from trainsys.launch import container
from trainsys.launch import job as jobs
from trainsys.launch.job import Job
from trainsys.launch.options import check
from trainsys.launch.tail import Tail

_MARKER = "# ==== the same"
_POLL_S = 1.0
# States that a job leaves again, of those in https://slurm.schedmd.com/job_state_codes.html: all others are final.
_GOING = {
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "EXPEDITING", "POWER_UP_NODE", "REQUEUED",
    "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
    "UPDATE_DB",
}  # fmt: skip
_HINTS = (
    ("invalid partition", "launch.partition", "`sinfo -s` lists the partitions"),
    ("invalid account", "launch.account", "`sacctmgr show assoc user=$USER` lists yours"),
    ("invalid qos", "launch.qos", "`sacctmgr show qos` lists them"),
    ("time limit", "launch.time", "`sinfo -o '%P %l'` shows each partition's limit"),
    ("node count", "launch.nodes", "`sinfo -s` shows how many nodes each partition has"),
    (
        "node configuration",
        "launch.nodes, launch.devices_per_node, launch.memory",
        "`sinfo -o '%P %D %c %m %G'` shows each partition's nodes, and their cores, MB and devices",
    ),
    ("more processors", "launch.devices_per_node", "`sinfo -o '%P %D %c'` shows the cores of the nodes"),
    ("invalid feature", "launch.constraint", "`sinfo -o '%f'` lists the features"),
    ("unable to contact", "SLURM_CONF", "is this a login node, and does slurmctld run? try `scontrol ping`"),
    ("configuration source", "SLURM_CONF", "is this a login node? try `scontrol ping`"),
)


def render(job: Job, first: int = 0) -> str:
    """The job script of ``job``'s tasks, which are those from ``first`` on of what was submitted."""
    run, launch = job.first, job.first.launch
    check(run, "slurm")
    array = len(job.runs) > 1
    limit = f"%{launch.array_limit}" if launch.array_limit else ""
    logs = str(job.folder / "logs").replace("%", "%%")
    each = f"{first}+%a" if first and array else "%a" if array else str(first)
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        *([f"--gpus-per-node={job.ranks_per_node}"] if job.on_devices else []),
        *([f"--cpus-per-task={launch.cpus_per_rank}"] if launch.cpus_per_rank else []),
        *([f"--mem={launch.memory}"] if launch.memory else []),
        *([f"--time={launch.time}"] if launch.time else []),
        *(_option(n, v) for n in _SAME if (v := getattr(launch, n))),
        *([f"--exclude={','.join(launch.exclude)}"] if launch.exclude else []),
        *([f"--array=0-{len(job.runs) - 1}{limit}"] if array else []),
        f"--signal=B:USR1@{launch.warn_s}",
        "--requeue",
        "--open-mode=append",
        _option("output", f"{logs}/slurm-{each}.out"),
        *launch.sbatch,
    ]
    preflight = job.on_devices if launch.preflight is None else launch.preflight
    own_python = container.hosts_python(job)
    inherited = "${PYTHONPATH:+:$PYTHONPATH}" if own_python else ""
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: {len(job.runs)} task(s) of {job.world} ranks; written by trainsys launch --on slurm",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"JOB_DIR={shlex.quote(str(job.folder))}",
        "RUN_FILE=",
        f"FIRST_TASK={first}",
        f"PYTHON=({shlex.quote(job.python) if own_python else 'python3'})",
        f"AFTER_PYTHON={shlex.quote(job.python)}",
        f"THREADS={run.train.threads or 'auto'}",
        f"PREFLIGHT={'yes' if preflight else 'no'}",
        f"EXCLUDE={shlex.quote(','.join(launch.exclude))}",
        f"SRUN_OPTIONS=({' '.join(map(shlex.quote, [*_binding(job), *container.options(job), *launch.srun]))})",
        *([f"export PYTHONPATH={shlex.quote(str(job.code))}{inherited}"] if job.code else []),
        *([f"export TRAINSYS_INTERFACE={shlex.quote(launch.interface)}"] if launch.interface else []),
        *([f"export TRAINSYS_PORT={launch.port}"] if launch.port else []),
        *([f'. "$JOB_DIR/{jobs.ENV_FILE}"    # {", ".join(launch.env)}'] if launch.env else []),
        *launch.setup,
        "",
    ]
    body = jobs.template("slurm/train.sbatch")
    return "\n".join(lines) + "\n" + body[body.index(_MARKER) :]


_SAME = ("account", "partition", "qos", "constraint", "reservation")


def _option(name: str, value: str) -> str:
    """An option as sbatch reads it from a script: by words, like a shell."""
    if re.search(r"[\s\"'\\#&|]", value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'--{name}="{escaped}"'
    return f"--{name}={value}"


def _binding(job: Job) -> list[str]:
    """A rank keeps to its own cores, and sees all devices of its node: NCCL reaches the others' over NVLink."""
    launch = job.first.launch
    cpu = launch.cpu_bind or ("cores" if job.on_devices else None)
    gpu = launch.gpu_bind or ("none" if job.on_devices else None)
    return [*([f"--cpu-bind={cpu}"] if cpu else []), *([f"--gpu-bind={gpu}"] if gpu else [])]


def launch(job: Job, dry_run: bool, detach: bool) -> int:
    """Submit ``job`` and follow it; the exit code is 0 once all its tasks are COMPLETED."""
    job = replace(job, runs=tuple(map(jobs.settled, job.runs)))
    if dry_run:
        print(render(job), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found on this machine; submit from a login node of the cluster, or print the job script "
            "with --dry-run and take it there"
        )
    ask("sinfo", "--noheader")
    parts = [(first, render(part, first)) for first, part in _parts(job, _largest_array())]
    _try(parts[0][1])
    jobs.write(job, "job.sbatch", parts[0][1], job.first.launch.variables)
    made: list[str] = []
    for first, text in parts:
        script = job.folder / (f"job-{first}.sbatch" if first else "job.sbatch")
        script.write_text(text, encoding="utf-8")
        # The limit is for all tasks: one array after the other.
        after = [f"--dependency=afterany:{made[-1]}"] if made and job.first.launch.array_limit else []
        made.append(ask("sbatch", "--parsable", *after, str(script)).split(";")[0].strip())
        jobs.record(job, "slurm", ",".join(made))
    identity = ",".join(made)
    print(
        f"trainsys: job {identity} submitted: {job.name}, {job.nodes} nodes, {job.world} ranks, {job.folder}"
    )
    return 0 if detach else follow(identity, job.folder)


def _parts(job: Job, largest: int) -> Iterator[tuple[int, Job]]:
    """The tasks as arrays that Slurm takes: the number of the first one, and those of the part."""
    for first in range(0, len(job.runs), largest):
        yield first, replace(job, runs=job.runs[first : first + largest])


def _largest_array() -> int:
    """How many tasks an array may have: their numbers stay below MaxArraySize."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(1, int(found[1])) if found else 1000


def _try(script: str) -> None:
    """Refuse now what Slurm would queue for ever: more nodes than there are, or than a partition may use."""
    try:
        ask("sbatch", "--test-only", stdin=script)
    except UserError as error:
        # Anything else, like nodes that are down today, may change while the job waits.
        if any(words in str(error).lower() for words, _, _ in _HINTS):
            raise


def ask(*command: str, stdin: str | None = None) -> str:
    """Run one of Slurm's commands; UserError, one line, with what would help, where it refuses."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found on this machine; use a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer from slurmctld in 60 s; try `scontrol ping`") from None
    if done.returncode == 0:
        return done.stdout
    said = [line.split("error: ")[-1] for line in done.stderr.splitlines() if line.strip()]
    text = " ".join(said).lower()
    for words, field, hint in _HINTS:
        if words in text:
            line = next((s for s in said if words in s.lower()), said[-1])
            line = line.removeprefix("allocation failure: ").removeprefix("Batch job submission failed: ")
            raise UserError(f"{command[0]}: {line}: {field}; {hint}")
    raise UserError(f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}")


def states(identity: str) -> dict[str, tuple[str, str]]:
    """By Slurm's name of each task, its state and the reason or nodes; empty once Slurm has forgotten the job.

    ``identity``: the number of the job, or several with commas between.
    """
    found: dict[str, tuple[str, str]] = {}
    for number in identity.split(","):
        try:
            shown = ask("scontrol", "show", "job", "-o", number)
        except UserError:
            found |= _from_accounting(number)
            continue
        for line in shown.splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            if "JobId" in fields:
                where = fields.get("NodeList", "")
                detail = where if where not in ("", "(null)") else fields.get("Reason", "")
                task = f"{number}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else number
                found[task] = (fields.get("JobState", "?"), detail)
    return found


def over(state: str) -> bool:
    """Whether a job that is in this state stays in it."""
    return state not in _GOING


def _from_accounting(identity: str) -> dict[str, tuple[str, str]]:
    try:
        shown = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList", "-j", identity)
    except UserError:
        return {}
    rows = (line.split("|") for line in shown.splitlines())
    return {task: (state.split()[0], nodes) for task, state, nodes in rows}


def follow(identity: str, folder: Path, rank: int | None = None) -> int:
    """Print the logs of a job's attempts as they grow, and its changes of state, until it is over. ``rank``: of
    that one alone."""
    logs = Tail(folder, rank)
    shown: dict[str, tuple[str, str]] = {}
    try:
        while True:
            now = states(identity)
            for task, (state, detail) in now.items():
                if shown.get(task) != (state, detail):
                    print(f"trainsys: job {task}: {state} {detail}".rstrip())
            shown = now or shown
            logs.show()
            if not now or all(over(state) for state, _ in now.values()):
                break
            sys.stdout.flush()
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(
            f"\ntrainsys: job {identity} goes on; trainsys jobs logs {identity}, trainsys jobs stop {identity}"
        )
        return 130
    if not now:
        print(f"trainsys: job {identity}: Slurm has forgotten it; its logs are in {folder}", file=sys.stderr)
        return 1
    return 0 if all(state == "COMPLETED" for state, _ in now.values()) else 1
