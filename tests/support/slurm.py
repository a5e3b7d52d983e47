"""A Slurm of several nodes on this machine, a run for it, and what tests ask about a job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainsys.cli import main
from trainsys.launch import slurm
from trainsys.telemetry.events import RunStart, Step
from trainsys.telemetry.reader import read_events

CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
PATIENCE_S = 300.0

RUN = """
name: tiny
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
parallel: {dp_shard: -1}
train: {steps: 150, seq_len: 32, global_batch: 8, micro_batch: 2, device: cpu, dtype: fp32, threads: 1}
data: {source: text, path: corpus.txt, tokenizer: bytes}
optim: {lr: 3e-3}
telemetry: {console: plain, out: runs}
checkpoint: {every: 10, keep_last: 2}
resilience: {grace_s: 25}
launch: {nodes: 2, devices_per_node: 2, max_restarts: 2, time: "1:00:00"}
"""


BAD = "127.0.0.12"
# Holds the interpreter's lock most of the time, as a node does whose cores are busy with something else.
SLOW = """
import ctypes, threading, time
held = ctypes.PyDLL(None)
def hold():
    while True:
        held.usleep(15000)
        time.sleep(0.005)
threading.Thread(target=hold, daemon=True).start()
"""


def spoil(work: Path, code: str, nodes: str = BAD) -> str:
    """A virtual environment whose python runs ``code`` first, on the bad node alone (or on
    all that the pattern ``nodes`` fits); the override that uses it."""
    (work / "venv/bin").mkdir(parents=True)
    (work / "venv/bad").mkdir()
    (work / "venv/bad/sitecustomize.py").write_text(code)
    python = work / "venv/bin/python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ "${{SLURMD_NODENAME:-}}" = {nodes} ]] && export PYTHONPATH="{work}/venv/bad:$PYTHONPATH"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return f"launch.venv={work}/venv"


def missing() -> str:
    """What of Slurm is not installed; empty: nothing."""
    return ", ".join(name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None)


needs_slurm = [
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()} not found; apt-get install slurm-wlm"),
    pytest.mark.timeout(900),
]
"""Marks of tests that start one."""


def submit(*arguments: str) -> tuple[str, Path]:
    """A job's id and folder."""
    before = set(Path("runs/jobs").glob("*"))
    assert main(["launch", "run.yaml", *arguments, "--on", "slurm", "--detach"]) == 0
    (folder,) = set(Path("runs/jobs").glob("*")) - before
    return str(json.loads((folder / "job.json").read_text())["id"]), folder


def wait_for(what: str, ready: Callable[[], bool], folder: Path, patience_s: float = PATIENCE_S) -> None:
    """Until ``ready``; fails after ``patience_s`` with all that the job has said."""
    deadline = time.monotonic() + patience_s
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"not seen in {patience_s:g} s: {what}\n{everything(folder)}")
        time.sleep(0.05)


def everything(folder: Path) -> str:
    found = [*folder.glob("logs/*.out"), *folder.glob("logs/*/*/*.log")]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(found))


def states(identity: str) -> set[str]:
    return {state for state, _ in slurm.states(identity).values()}


def losses(runs: Path, name: str) -> dict[int, float]:
    """Loss by step over all attempts; two attempts that did the same step must agree to the bit."""
    found: dict[int, float] = {}
    for path in sorted(runs.glob(f"{name}-*/events/rank_00000.jsonl")):
        for event in read_events(path)[0]:
            if isinstance(event, Step):
                assert found.setdefault(event.step, event.loss) == event.loss, (path, event.step)
    return found


def starts_of(runs: Path, name: str) -> list[int]:
    """The first step of every attempt that came as far as its files, in order."""
    files = sorted(runs.glob(f"{name}-*/events/rank_00000.jsonl"))
    return [e.first_step for file in files for e in read_events(file)[0] if isinstance(e, RunStart)]


def quiet(name: str, *overrides: str) -> dict[int, float]:
    """The same run in one process, undisturbed."""
    command = [sys.executable, "-m", "trainsys", "train", "run.yaml", f"name={name}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)
    return losses(Path("runs"), name)


def saved(folder: Path, attempt: int) -> bool:
    """Whether this attempt trains, and has made progress that a next one can build on."""
    log = folder / f"logs/task-0/attempt-{attempt}/train-00000.log"
    return log.exists() and "\nstep " in log.read_text()


def ranks_of(identity: str, node: str = "") -> list[int]:
    """Process ids of a job's training ranks, on all nodes or on one."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if b"trainsys.launch.rank" not in (proc / "cmdline").read_bytes():
                continue
            environment = (proc / "environ").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={identity}".encode() not in environment:
                continue
            if node and f"SLURMD_NODENAME={node}".encode() not in environment:
                continue
            if (proc / "cmdline").read_bytes().split(b"\0")[0].endswith((b"python", b"python3")):
                found.append(int(proc.name))
        except OSError:
            continue
    return found
