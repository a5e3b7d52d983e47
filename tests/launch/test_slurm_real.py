"""A Slurm of its own: what was submitted ends COMPLETED, whatever happens to it, with the losses of a quiet run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainsys.cli import main
from trainsys.launch import slurm
from trainsys.telemetry.events import Step
from trainsys.telemetry.reader import read_events

MISSING = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"no Slurm: {', '.join(MISSING)} not found; apt-get install slurm-wlm"
    ),
    pytest.mark.timeout(900),
]

CLUSTER = Path(__file__).resolve().parents[1] / "support" / "slurm_cluster.sh"
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    folder = tmp_path_factory.mktemp("slurm")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    patch.setenv("SLURM_TEST_PORT", str(21000 + os.getpid() % 500 * 10))

    def call(action: str, *arguments: str) -> None:
        subprocess.run([str(CLUSTER), action, str(folder), *arguments], check=True, timeout=60)

    try:
        call("up", "3")
        yield call
    finally:
        call("down")
        patch.undo()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    lines = (f"{n} and {n + 1} make {2 * n + 1}" for n in range(3000))
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*arguments: str) -> tuple[str, Path]:
    """A job's id and folder."""
    before = set(Path("runs/jobs").glob("*"))
    assert main(["launch", "run.yaml", *arguments, "--on", "slurm", "--detach"]) == 0
    (folder,) = set(Path("runs/jobs").glob("*")) - before
    return str(json.loads((folder / "job.json").read_text())["id"]), folder


def wait_for(what: str, ready: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"not seen in {PATIENCE_S:g} s: {what}\n{everything(folder)}")
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


def quiet(name: str, *overrides: str) -> dict[int, float]:
    """The same run in one process, undisturbed."""
    command = [sys.executable, "-m", "trainsys", "train", "run.yaml", f"name={name}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)
    return losses(Path("runs"), name)


def saved(folder: Path, attempt: int) -> bool:
    """Whether this attempt trains, and has made progress that a next one can build on."""
    log = folder / f"logs/task-0/attempt-{attempt}/train-00000.log"
    return log.exists() and "\nstep " in log.read_text()


def ranks_of(identity: str) -> list[int]:
    """Process ids of a job's training ranks."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if b"trainsys.launch.rank" not in (proc / "cmdline").read_bytes():
                continue
            if f"SLURM_JOB_ID={identity}\0".encode() not in (proc / "environ").read_bytes():
                continue
            if (proc / "cmdline").read_bytes().split(b"\0")[0].endswith((b"python", b"python3")):
                found.append(int(proc.name))
        except OSError:
            continue
    return found


@pytest.mark.slow  # minutes: SlurmdTimeout and requeue waits add up over five faults
def test_whatever_happens_the_job_completes_with_the_losses_of_a_quiet_run(
    cluster: Callable[..., None], work: Path
) -> None:
    """One job, disturbed once in every attempt: each next one goes on where the last had saved."""
    identity, folder = submit()
    out = folder / "logs/slurm-0.out"

    def requeue() -> None:
        slurm.ask("scontrol", "requeue", identity)

    def warning() -> None:
        # What --signal=B:USR1@… does when the time limit comes near.
        slurm.ask("scancel", "--batch", "--signal=USR1", identity)

    def kill_rank() -> None:
        os.kill(ranks_of(identity)[-1], signal.SIGKILL)

    def preempt() -> None:
        wrapped = [
            "sbatch",
            "--parsable",
            "-p",
            "urgent",
            "-N3",
            "--exclusive",
            "-o",
            "/dev/null",
            "--wrap",
            "true",
        ]
        slurm.ask(*wrapped)

    def kill_node() -> None:
        cluster("kill", "127.0.0.12")

    for attempt, disturb in enumerate([requeue, warning, kill_rank, preempt, kill_node]):
        wait_for(f"attempt {attempt} trains", lambda a=attempt: saved(folder, a), folder)
        wait_for("a rank", lambda: len(ranks_of(identity)) == 4, folder)
        disturb()
    wait_for("the end", lambda: states(identity) <= {"COMPLETED", "FAILED", "CANCELLED"}, folder)

    said = out.read_text()
    assert states(identity) == {"COMPLETED"}, everything(folder)
    assert "attempt 1: again: asked to stop by SIGUSR1, step " in said
    assert "attempt 2: again: a rank was killed (srun: exit code 1" in said
    assert (
        "attempt 3: again: asked to stop by SIGTERM, step " in said or "attempt 3: again: preempted" in said
    )
    assert "attempt 5: done" in said
    assert "attempt 5 on 127.0.0.[11,13]" in said
    assert "resumed from step" in everything(folder)
    disturbed = losses(Path("runs"), "tiny")
    assert sorted(disturbed) == list(range(150))
    undisturbed = quiet("quiet")
    assert disturbed == pytest.approx(undisturbed, rel=1e-4)
    assert undisturbed[149] < undisturbed[0] - 0.1


def test_a_grid_runs_as_an_array_of_what_was_submitted(
    cluster: Callable[..., None], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Followed to the end: every task completes, from the copied code, and jobs ls and logs know them."""
    small = ["launch.nodes=1", "launch.devices_per_node=1", "train.steps=6", "launch.preflight=true"]
    grid = ["--grid", "optim.lr=1e-3,1e-2"]
    code = main(["launch", "run.yaml", *small, *grid, "--on", "slurm"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "COMPLETED" in said
    assert "preflight: 1 ranks on 1 nodes: all fit" in said
    (folder,) = Path("runs/jobs").glob("*")
    for number, lr in enumerate((1e-3, 1e-2)):
        own = losses(Path("runs"), f"tiny-{number:04d}")
        assert sorted(own) == list(range(6))
        assert f"lr: {lr}" in (folder / f"runs/{number}.yaml").read_text()
        (run,) = Path("runs").glob(f"tiny-{number:04d}-*")
        assert (run / "summary.json").exists()
    assert losses(Path("runs"), "tiny-0000")[0] == losses(Path("runs"), "tiny-0001")[0]
    assert losses(Path("runs"), "tiny-0000")[5] != losses(Path("runs"), "tiny-0001")[5]
    assert main(["jobs", "ls"]) == 0
    table = capsys.readouterr().out
    assert "2 COMPLETED" in table
    assert "6/6" in table
    assert main(["jobs", "logs", folder.name, "--rank", "0"]) == 0
    assert "step 6/6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launch.partition=gpus"], "launch.partition; `sinfo -s`"),
        (["launch.nodes=9"], "node configuration is not available: launch.nodes"),
        (["launch.cpus_per_rank=64"], "node configuration is not available: launch.nodes"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    cluster: Callable[..., None],
    work: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    says: str,
) -> None:
    assert main(["launch", "run.yaml", "train.global_batch=72", *overrides, "--on", "slurm"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_no_controller_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(work / "nowhere.conf"))
    assert main(["launch", "run.yaml", "--on", "slurm"]) == 2
    error = capsys.readouterr().err
    assert "sinfo: " in error
    assert len(error.splitlines()) == 1


def test_stop_saves_and_is_not_started_again(
    cluster: Callable[..., None], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity, folder = submit("launch.nodes=1", "launch.devices_per_node=1", "train.steps=100000")
    wait_for("it trains", lambda: saved(folder, 0), folder)
    assert main(["jobs", "stop", identity]) == 0
    wait_for("the end", lambda: states(identity) == {"CANCELLED"} and not ranks_of(identity), folder)
    assert "asked to stop" in everything(folder)
    assert any(Path("runs/checkpoints/tiny").glob("*"))
