from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainsys.launch.after import _MARKER, verdict
from trainsys.launch.failure import Failure


def drained(folder: Path, step: int | None) -> None:
    (folder / "drained.json").write_text(json.dumps({"signal": "SIGUSR1", "saved_step": step}))


def ask(
    folder: Path, code: int = 0, asked: str = "", failure: Failure | None = None, restarts: int = 2
) -> str:
    return verdict(folder, code, asked, failure, folder / "history.json", restarts)


def test_the_marker_is_the_one_that_drain_writes() -> None:
    from trainsys.resilience.drain import MARKER

    assert _MARKER == MARKER


def test_all_steps_done(tmp_path: Path) -> None:
    assert ask(tmp_path) == "done"
    assert ask(tmp_path, asked="USR1") == "done"


def test_a_drained_run_goes_on_and_costs_nothing(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        drained(tmp_path, step)
        assert (
            ask(tmp_path, asked="USR1", restarts=0)
            == f"again: asked to stop by SIGUSR1, step {step} is saved"
        )


def test_draining_without_progress_is_bounded(tmp_path: Path) -> None:
    drained(tmp_path, 10)
    assert ask(tmp_path, asked="USR1", restarts=1).startswith("again: asked")
    assert ask(tmp_path, asked="USR1", restarts=1).endswith("failure 1 of 1 that are started again")
    assert ask(tmp_path, asked="USR1", restarts=1).startswith(
        "fail 1: asked to stop, and nothing new was saved"
    )
    (tmp_path / "drained.json").write_text("{")  # damaged: no step is known
    assert ask(tmp_path, asked="USR1", restarts=1).startswith("fail")


def test_failures_are_bounded_and_named(tmp_path: Path) -> None:
    boom = Failure(3, 1, "ValueError: boom\nsecond line")
    assert (
        ask(tmp_path, 1, failure=boom)
        == "again: rank 3: ValueError: boom; failure 1 of 2 that are started again"
    )
    assert (
        ask(tmp_path, 137)
        == "again: a rank was killed (srun: exit code 137); failure 2 of 2 that are started again"
    )
    assert ask(tmp_path, 5) == "fail 5: exit code 5; that is failure 3, and launch.max_restarts is 2"


def test_ranks_that_slurm_ended_after_a_failure_did_not_drain_on_request(tmp_path: Path) -> None:
    drained(tmp_path, 20)
    assert ask(tmp_path, 137).startswith("again: a rank was killed (srun: exit code 137); failure 1")


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    mistake = Failure(0, 2, "UserError: data.path: no such file")
    assert ask(tmp_path, 2, failure=mistake) == "fail 2: rank 0: UserError: data.path: no such file"


@pytest.mark.parametrize("code", [143, 137])
def test_preempted_before_it_could_save(tmp_path: Path, code: int) -> None:
    assert ask(tmp_path, code, asked="TERM", restarts=0) == "again: preempted before it could save"
