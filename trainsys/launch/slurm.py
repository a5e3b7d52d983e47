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
from pathlib import Path

from trainsys.errors import UserError
from trainsys.launch import job as jobs
from trainsys.launch.job import Job
from trainsys.launch.options import check
from trainsys.launch.tail import Tail

_MARKER = "# ==== the same"
_POLL_S = 1.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "NODE_FAIL")
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


def render(job: Job) -> str:
    """The job script."""
    run, launch = job.first, job.first.launch
    check(run, "slurm")
    array = len(job.runs) > 1
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        *([f"--gpus-per-node={job.ranks_per_node}"] if job.on_devices else []),
        *([f"--cpus-per-task={launch.cpus_per_rank}"] if launch.cpus_per_rank else []),
        *([f"--mem={launch.memory}"] if launch.memory else []),
        *([f"--time={launch.time}"] if launch.time else []),
        *(f"--{n}={v}" for n in _SAME if (v := getattr(launch, n))),
        *([f"--exclude={','.join(launch.exclude)}"] if launch.exclude else []),
        *([f"--array=0-{len(job.runs) - 1}"] if array else []),
        f"--signal=B:USR1@{launch.warn_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.folder}/logs/slurm-{'%a' if array else '0'}.out",
        *launch.sbatch,
    ]
    checkpoints = [str(Path(r.checkpoint_folder)) for r in job.runs]
    preflight = job.on_devices if launch.preflight is None else launch.preflight
    srun = []
    if launch.container:
        mounts = ",".join([f"{job.folder}:{job.folder}", *launch.mounts])
        srun = [f"--container-image={launch.container}", f"--container-mounts={mounts}"]
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: {len(job.runs)} task(s) of {job.world} ranks; written by trainsys launch --on slurm",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"JOB_DIR={shlex.quote(str(job.folder))}",
        "RUN_FILE=$JOB_DIR/runs/${SLURM_ARRAY_TASK_ID:-0}.yaml",
        f"folders=({' '.join(map(shlex.quote, checkpoints))})",
        "CHECKPOINTS=${folders[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"MAX_RESTARTS={launch.max_restarts}",
        f"PYTHON={shlex.quote(job.python)}",
        f"PREFLIGHT={'yes' if preflight else 'no'}",
        f"EXCLUDE={shlex.quote(','.join(launch.exclude))}",
        f"SRUN_OPTIONS=({' '.join(map(shlex.quote, srun))})",
        *(
            [f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
            if job.code
            else []
        ),
        *([f"export TRAINSYS_INTERFACE={shlex.quote(launch.interface)}"] if launch.interface else []),
        *([f"export TRAINSYS_PORT={launch.port}"] if launch.port else []),
        *(["export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"] if not run.train.threads else []),
        *([f'. "$JOB_DIR/{jobs.ENV_FILE}"    # {", ".join(launch.env)}'] if launch.env else []),
        *launch.setup,
        "",
    ]
    body = jobs.template("slurm/train.sbatch")
    return "\n".join(lines) + "\n" + body[body.index(_MARKER) :]


_SAME = ("account", "partition", "qos", "constraint", "reservation")


def launch(job: Job, dry_run: bool, detach: bool) -> int:
    """Submit ``job`` and follow it; the exit code is 0 once all its tasks are COMPLETED."""
    if dry_run:
        print(render(job), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found on this machine; submit from a login node of the cluster, or print the job script "
            "with --dry-run and take it there"
        )
    text = render(job)
    _try(text)
    script = jobs.write(job, "job.sbatch", text, job.first.launch.variables)
    identity = ask("sbatch", "--parsable", str(script)).split(";")[0].strip()
    jobs.record(job, "slurm", identity)
    print(
        f"trainsys: job {identity} submitted: {job.name}, {job.nodes} nodes, {job.world} ranks, {job.folder}"
    )
    return 0 if detach else follow(identity, job.folder)


def _try(script: str) -> None:
    """Refuse now what Slurm would queue for ever: more nodes than there are, or than a partition may use."""
    ask("sinfo", "--noheader")
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
    """Task by task, the job's state and the reason or nodes that Slurm gives; empty once Slurm has forgotten it."""
    try:
        shown = ask("scontrol", "show", "job", "-o", identity)
    except UserError:
        return _from_accounting(identity)
    found = {}
    for line in shown.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobId" in fields:
            where = fields.get("NodeList", "")
            detail = where if where not in ("", "(null)") else fields.get("Reason", "")
            found[fields.get("ArrayTaskId", "0")] = (fields.get("JobState", "?"), detail)
    return found


def _from_accounting(identity: str) -> dict[str, tuple[str, str]]:
    try:
        shown = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList", "-j", identity)
    except UserError:
        return {}
    rows = (line.split("|") for line in shown.splitlines())
    return {i.partition("_")[2] or "0": (state.split()[0], nodes) for i, state, nodes in rows}


def follow(identity: str, folder: Path) -> int:
    """Print the logs of a job's attempts as they grow, and its changes of state, until it is over."""
    logs = Tail(folder)
    shown: dict[str, tuple[str, str]] = {}
    try:
        while True:
            now = states(identity)
            for task, (state, detail) in now.items():
                if shown.get(task) != (state, detail):
                    print(
                        f"trainsys: job {identity}{'_' + task if len(now) > 1 else ''}: {state} {detail}".rstrip()
                    )
            shown = now or shown
            logs.show()
            if not now or all(state in OVER for state, _ in now.values()):
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
