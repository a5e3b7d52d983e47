from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainsys.errors import UserError
from trainsys.failure import FAILURE_FILE
from trainsys.launch import agent, local
from trainsys.launch.local import launch
from trainsys.launch.proof import DONE_FILE

ROOT = Path(__file__).resolve().parents[2]

# A rank without torch: what is tested is the launcher, the agent and the guard.
RANK = """
import os, signal, sys, time
from trainsys.failure import guard
rank = os.environ["RANK"]
with guard():
    mode = sys.argv[1]
    if mode == "fail" and rank == "0":
        raise RuntimeError("Connection closed by peer")
    if rank == "1":
        time.sleep(0.3)
        if mode == "fail":
            raise ValueError("boom")
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if mode != "fine":
        time.sleep(900)
print(rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"])
"""


# The demo's settings change with tuning; these do not.
RUN = """
name: run
model: {n_layers: 2, d_model: 64, n_heads: 8, n_kv_heads: 4, d_ff: 704, vocab: 320}
parallel: {dp_shard: 2, tp: 2}
train: {seq_len: 256, global_batch: 16, micro_batch: 8, device: cpu}
"""


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str, nproc: int | None = None) -> str:
    assert launch("run.yaml", list(overrides), nproc, dry_run=True) == 0
    return capsys.readouterr().out.strip()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Six cores, no CUDA device, one config, and nothing of the environment this test runs in."""
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "usable_cores", lambda: 6)
    monkeypatch.setattr(local, "cuda_devices", lambda: 0)
    for name in ("OMP_NUM_THREADS", FAILURE_FILE, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(capsys, "train.steps=3", "name=a-b") == (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --standalone --nproc-per-node 4 "
        "-m trainsys train run.yaml train.steps=3 name=a-b"
    )


@pytest.mark.parametrize(
    ("overrides", "nproc", "world", "threads"),
    [
        (["parallel.dp_shard=3", "train.micro_batch=1", "train.global_batch=18"], None, 6, 1),
        (["parallel.dp_shard=-1", "train.global_batch=24"], None, 6, 1),
        (["parallel.dp_shard=-1"], 2, 2, 3),
        (["parallel.dp_shard=-1", "parallel.tp=4"], None, 4, 1),
        (["train.threads=5"], None, 4, 5),
    ],
)
def test_how_many_ranks_and_threads(
    capsys: pytest.CaptureFixture[str], overrides: list[str], nproc: int | None, world: int, threads: int
) -> None:
    command = dry_run(capsys, *overrides, nproc=nproc)
    assert f"--nproc-per-node {world} " in command
    assert command.startswith(f"OMP_NUM_THREADS={threads} ")


def test_fewer_cores_than_the_layout_has_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 1)
    assert "--nproc-per-node 2 " in dry_run(capsys, "parallel.dp_shard=-1")


def test_the_users_thread_count_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert dry_run(capsys).startswith("OMP_NUM_THREADS=9 ")
    assert dry_run(capsys, "train.threads=2").startswith("OMP_NUM_THREADS=2 ")


def test_gpus_decide_where_there_are_some(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cuda_devices", lambda: 8)
    rest = ["parallel.dp_shard=-1", "train.device=auto", "train.global_batch=32"]
    assert "--nproc-per-node 8 " in dry_run(capsys, *rest)
    assert "--nproc-per-node 6 " in dry_run(capsys, *rest, "train.device=cpu", "train.global_batch=24")


def test_one_rank_needs_no_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(capsys, "parallel.dp_shard=1", "parallel.tp=1") == (
        f"OMP_NUM_THREADS=6 {sys.executable} -m trainsys train run.yaml parallel.dp_shard=1 parallel.tp=1"
    )


@pytest.mark.parametrize(
    ("overrides", "nproc", "devices", "says"),
    [
        ([], 3, 0, "--nproc 3, but the layout is fixed at 4 ranks"),
        ([], 0, 0, "--nproc 0: at least one process"),
        (["parallel.dp_shard=-1"], 3, 0, "multiple of 2 ranks .* but the world has 3; start 2 or 4 ranks"),
        (["parallel.dp_shard=-1", "parallel.tp=-1"], None, 0, "are -1: only one axis"),
        (
            ["parallel.tp=3", "parallel.sequence_parallel=false"],
            None,
            0,
            "parallel.tp=3 does not divide model.n_heads=8",
        ),
        (["train.seq_len=255"], None, 0, "seq_len=255 does not divide by parallel.tp=2"),
        (["train.device=cuda"], None, 0, "train.device=cuda, but this machine shows no CUDA device"),
        (["train.device=cuda"], None, 2, "4 ranks with train.device=cuda, .* shows 2 CUDA devices"),
        (["parallel.tpp=3"], None, 0, "did you mean parallel.tp"),
    ],
)
def test_mistakes_are_found_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], nproc: int | None, devices: int, says: str
) -> None:
    monkeypatch.setattr(local, "cuda_devices", lambda: devices)
    monkeypatch.setattr(local, "run_agent", lambda _: pytest.fail("started"))
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=says) as caught:
        launch("run.yaml", overrides, nproc)
    assert "\n" not in str(caught.value)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("fine", 0, ""),
        ("kill", 137, "trainsys: error: rank 1 was killed by SIGKILL (out of memory?)\n"),
        ("fail", 1, None),
    ],
)
def test_the_end_of_a_run_on_real_torchrun(tmp_path: Path, mode: str, code: int, said: str | None) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    start = (
        "import sys; from trainsys.launch.agent import run_agent;"
        f"sys.exit(run_agent(['--standalone', '--nproc-per-node', '2', {str(script)!r}, {mode!r}]).code)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3", "TMPDIR": str(tmp_path)}
    # Ranks sleep for 900 s: a run that is not ended by its failing rank times out here.
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, env=env, timeout=240, check=False
    )
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.splitlines()) == (["0 2 3", "1 2 3"] if mode == "fine" else [])
    if said is None:
        said = "trainsys: rank 1 of 2 failed\n" + done.stderr.partition("failed\n")[2]
        assert re.fullmatch(r'Traceback .*\n  File ".*rank.py", .*\n(.*\n)*ValueError: boom\n',
                            done.stderr.partition("failed\n")[2])  # fmt: skip
    assert done.stderr == said
    assert not list(tmp_path.glob("trainsys-*")), "the failure file is left behind"


@pytest.mark.parametrize(
    ("left", "code", "said"),
    [
        ("", 1, "the run ended without finishing: there is no proof that it reached step 100"),
        (
            '{"step": 7}',
            1,
            "the run ended without finishing: its proof says step 7, not that it reached step 100",
        ),
        ('{"step": 100}', 0, ""),
        ("drained", 0, ""),
    ],
)
def test_exit_code_0_of_all_ranks_is_not_yet_a_run_that_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    left: str, code: int, said: str,
) -> None:  # fmt: skip
    def torchrun(module: str, **_: object) -> None:
        if left == "drained":
            folder = tmp_path / "runs/checkpoints/run"
            folder.mkdir(parents=True)
            (folder / "drained.json").write_text("{}")
        elif left:
            Path(os.environ[DONE_FILE]).write_text(left)

    monkeypatch.setattr(runpy, "run_module", torchrun)
    monkeypatch.setattr(agent.logging, "disable", lambda _: None)
    for name in ("argv", "OMP_NUM_THREADS", FAILURE_FILE, DONE_FILE):
        if name == "argv":
            monkeypatch.setattr(sys, "argv", ["pytest"])
        else:
            monkeypatch.setenv(name, "1")
    assert launch("run.yaml") == code
    assert capsys.readouterr().err == (f"trainsys: error: {said}\n" if said else "")


@dataclass
class Ended:
    """What torchrun tells of a rank that failed."""

    exitcode: int


class ChildFailedError(Exception):
    """As torchrun's: the ranks that failed, by number."""

    def __init__(self, exit_codes: dict[int, int]) -> None:
        super().__init__("a long summary with a box around it")
        self.failures = {rank: Ended(code) for rank, code in exit_codes.items()}

    def get_first_failure(self) -> None: ...


class SignalException(Exception):
    sigval = signal.SIGINT


@pytest.mark.parametrize(
    ("error", "report", "code", "said"),
    [
        (ChildFailedError({0: 1, 1: 1}), '{"rank": 1, "code": 2, "message": "told"}', 2, ""),
        (ChildFailedError({0: -15, 1: 7}), "", 7, "rank 1 ended with exit code 7"),
        (ChildFailedError({0: -15, 2: -9, 3: -15}), "", 137, "rank 2 was killed by SIGKILL (out of memory?)"),
        (ChildFailedError({3: -11}), "", 139, "rank 3 was killed by SIGSEGV"),
        (SignalException(), "", 130, ""),
        (OSError("port in use"), "", 1, "torchrun could not run the ranks: port in use"),
    ],
)
def test_the_exit_code_that_the_run_deserves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception, report: str, code: int, said: str,
) -> None:  # fmt: skip
    def torchrun(module: str, **_: object) -> None:
        assert (module, sys.argv[1:]) == ("torch.distributed.run", ["--standalone", "x.py"])
        if report:
            Path(os.environ[FAILURE_FILE]).write_text(report)
        raise error

    monkeypatch.setattr(runpy, "run_module", torchrun)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(agent.logging, "disable", lambda _: None)
    monkeypatch.setenv(FAILURE_FILE, "replaced")
    assert agent.run_agent(["--standalone", "x.py"]).code == code
    assert capsys.readouterr().err == (f"trainsys: error: {said}\n" if said else "")
