"""`launch --on local` with resilience.max_restarts: which ends are started again, how often, and what is said."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainsys.failure import RESTARTS, Failure
from trainsys.launch import local
from trainsys.launch.agent import End
from trainsys.launch.local import launch

RUN = """
name: run
model: {n_layers: 2, d_model: 64, n_heads: 8, d_ff: 704, vocab: 320}
parallel: {dp_shard: 2}
train: {steps: 100, seq_len: 32, global_batch: 8, device: cpu, threads: 1}
resilience: {max_restarts: 2}
"""
DONE = End(0)
KILLED = End(137)
MISTAKE = End(2, Failure(0, 2, "train.lr: no such key"))
FULL_DISK = End(75, Failure(0, 75, "/data is full"))

Attempts = Callable[[list[tuple[End, int]]], tuple[int, list[str]]]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Attempts:
    """Launch where torchrun ends as listed, each time after saving up to a step; the exit code, and each attempt's
    number as its ranks see it."""
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "TRAINSYS_COMMAND", RESTARTS):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(time, "sleep", lambda s: print(f"slept {s}"))

    def run(ends: list[tuple[End, int]]) -> tuple[int, list[str]]:
        seen: list[str] = []

        def agent(arguments: list[str], *_: object) -> End:
            assert "--max-restarts" not in arguments
            end, saved = ends[len(seen)]
            seen.append(os.environ[RESTARTS])
            for step in range(1, saved + 1):
                folder = Path(f"runs/checkpoints/run/step_{step:08d}")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "manifest.json").write_text("{}")
            return end

        monkeypatch.setattr(local, "run_agent", agent)
        return launch("run.yaml"), seen

    return run


def test_failures_count_until_a_newer_step_is_saved(
    attempts: Attempts, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [(KILLED, 0), (KILLED, 0), (KILLED, 3), (KILLED, 3), (KILLED, 4), (DONE, 5)]
    assert attempts(ends) == (0, ["0", "1", "2", "3", "4", "5"])
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("failure ")[2][:6] for line in said] == [
        "1 of 2",
        "2 of 2",
        "1 of 2",
        "2 of 2",
        "1 of 2",
    ]
    assert (
        said[0] == "trainsys: again: a rank was killed (exit code 137); failure 1 of 2 that are started again"
    )


def test_the_third_failure_in_a_row_is_the_end(
    attempts: Attempts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempts([(KILLED, 2), (KILLED, 2), (KILLED, 2)]) == (137, ["0", "1", "2"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("that is failure 3 since step 2 was saved, and resilience.max_restarts is 2")


def test_a_mistake_is_not_started_again(attempts: Attempts, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempts([(MISTAKE, 0)]) == (2, ["0"])
    assert capsys.readouterr().err == "", "the rank has said it"


def test_a_fault_of_no_node_is_given_time_to_pass(
    attempts: Attempts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempts([(FULL_DISK, 0), (FULL_DISK, 0), (DONE, 0)])[0] == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["slept 60", "slept 120"]
    assert err.splitlines()[0].endswith("failure 1 of 2 that are started again, in 60 s")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_between_two_attempts_it_ends(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(local, "pass_on", lambda *_: False)  # no rank runs
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        attempts([(FULL_DISK, 0)])
    assert left.value.code == code
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("attempts")
def test_asked_to_stop_it_is_not_started_again_even_if_a_rank_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "pass_on", lambda *_: True)
    monkeypatch.setattr(local, "verdict", lambda *_: pytest.fail("it was asked to stop"))

    def agent(*_: object) -> End:
        os.kill(os.getpid(), signal.SIGTERM)
        return KILLED

    monkeypatch.setattr(local, "run_agent", agent)
    assert launch("run.yaml") == 137
