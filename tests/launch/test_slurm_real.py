"""A Slurm of its own: what was submitted ends COMPLETED, whatever happens to it, with the losses of a quiet run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.slurm import (
    PATIENCE_S,
    SLOW,
    everything,
    losses,
    needs_slurm,
    quiet,
    ranks_of,
    saved,
    spoil,
    starts_of,
    states,
    submit,
    wait_for,
)
from trainsys.cli import main
from trainsys.launch import slurm

pytestmark = [pytest.mark.timing, *needs_slurm]


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

    killed: list[str] = []

    def kill_rank() -> None:
        pid = ranks_of(identity)[-1]
        env = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        killed.append(f"rank {env['SLURM_PROCID']} on {env['SLURMD_NODENAME']}")
        os.kill(pid, signal.SIGKILL)

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

    frozen: list[int] = []

    def kill_node() -> None:
        # A node that is gone says nothing any more, not even that a connection is closed.
        frozen.extend(ranks_of(identity, "127.0.0.12"))
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        cluster("kill", "127.0.0.12")

    for attempt, disturb in enumerate([requeue, warning, kill_rank, preempt, kill_node]):
        wait_for(f"attempt {attempt} trains", lambda a=attempt: saved(folder, a), folder)
        wait_for("a rank", lambda: len(ranks_of(identity)) == 4, folder)
        disturb()
    try:
        wait_for("the end", lambda: states(identity) <= {"COMPLETED", "FAILED", "CANCELLED"}, folder)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGKILL)

    said = out.read_text()
    assert states(identity) == {"COMPLETED"}, everything(folder)
    assert "attempt 1: again: asked to stop by SIGUSR1, step " in said
    assert f"attempt 2: again: {killed[0]}: killed (srun: exit code 1" in said
    assert (
        "attempt 3: again: asked to stop by SIGTERM, step " in said or "attempt 3: again: preempted" in said
    )
    assert "attempt 5: done" in said
    assert "attempt 5 on 127.0.0.[11,13]" in said
    assert starts_of(Path("runs"), "tiny")[-1] > 0, "the last attempt went on where another had saved"
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
    assert "preflight: 1 ranks on 1 node: all fit" in said
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


def test_srun_alone_starts_one_run_of_all_its_tasks(cluster: Callable[..., None], work: Path) -> None:
    """Not a run for each of them, in one folder."""
    command = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "trainsys", "train", "run.yaml"]
    subprocess.run([*command, "train.steps=3"], check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)
    (run,) = Path("runs").glob("tiny-*")
    assert len(list(run.glob("events/rank_*.jsonl"))) == 2
    assert sorted(losses(Path("runs"), "tiny")) == [0, 1, 2]


SWEEP = """
name: three
run: run.yaml
overrides: [launch.nodes=2, launch.devices_per_node=1, launch.max_restarts=0]
points:
  - {train.micro_batch: 1}
  - {train.micro_batch: 4}
  - {train.micro_batch: 3}
  - {model.d_ff: 4000000000000}
steps: 6
"""


def test_a_sweep_is_an_array_whose_results_are_a_leaderboard(
    cluster: Callable[..., None], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What finished, what ran out of memory on its node and what no layout can run; none is run again."""
    Path("sweep.yaml").write_text(SWEEP)
    assert main(["sweep", "sweep.yaml", "--on", "slurm", "--json"]) == 1, "a task did not end well"
    said = capsys.readouterr().out
    rows = {row["candidate"]: row for row in json.loads(said[said.index("{\n") :])["candidates"]}
    found = {point: row["status"] for point, row in rows.items()}
    assert found == {
        "micro_batch=1": "done",
        "micro_batch=4": "done",
        "micro_batch=3": "refused",
        "d_ff=4000000000000": "oom",
    }
    times = [rows[f"micro_batch={n}"]["step_time_s"] for n in (1, 4)]
    assert all(0 < seconds < 60 for seconds in times)
    (job,) = Path("runs/sweeps/three/jobs").glob("*")
    assert main(["sweep", "sweep.yaml", "--on", "slurm"]) == 0
    assert "4 candidates, 4 have ended" in capsys.readouterr().out
    assert list(Path("runs/sweeps/three/jobs").glob("*")) == [job]


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


@pytest.mark.slow  # minutes: limits have minutes, and Slurm warns up to 20 s late
def test_the_time_limit_is_survived(cluster: Callable[..., None], work: Path) -> None:
    """Slurm's own warning, not one that a test sends: the run saves, is requeued and goes on."""
    limits = ["launch.time=0:03:00", "launch.warn_s=60", "train.steps=1000"]
    identity, folder = submit(spoil(work, SLOW, nodes="*"), *limits)
    wait_for("the end", lambda: all(map(slurm.over, states(identity))), folder, patience_s=850.0)
    said = (folder / "logs/slurm-0.out").read_text()
    assert states(identity) == {"COMPLETED"}, everything(folder)
    assert "attempt 0: again: asked to stop by SIGUSR1, step " in said
    assert sorted(losses(Path("runs"), "tiny")) == list(range(1000))
