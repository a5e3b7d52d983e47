from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from support.slurm import RUN
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.manifest import Manifest
from trainsys.failure import Failure
from trainsys.launch.after import MARKER as READ
from trainsys.launch.after import Attempt, _drained, cause, main, newest_saved, verdict
from trainsys.launch.proof import content, doubt, last_step


def drained(folder: Path, step: int | None) -> None:
    (folder / "drained.json").write_text(json.dumps({"signal": "SIGUSR1", "saved_step": step}))


def ask(
    folder: Path,
    code: int = 0,
    asked: str = "",
    failure: Failure | None = None,
    restarts: int = 2,
    *,
    saved: int = -1,
    doubt: str = "no proof",
) -> str:
    attempt = Attempt(code, doubt, asked, failure, _drained(folder), saved)
    return verdict(attempt, folder / "history.json", restarts).line


def test_the_marker_is_the_one_that_drain_writes() -> None:
    from trainsys.resilience.drain import MARKER

    assert READ == MARKER


def test_all_steps_done(tmp_path: Path) -> None:
    assert ask(tmp_path, doubt="") == "done"
    assert ask(tmp_path, asked="USR1", doubt="") == "done"
    drained(tmp_path, 10)
    assert ask(tmp_path, doubt="") == "done", "asked to stop when nothing was left to do"


def test_exit_code_0_without_proof_is_a_failure(tmp_path: Path) -> None:
    said = "ended without finishing: there is no proof that it reached step 12"
    assert ask(tmp_path, doubt=said) == f"again: {said}; failure 1 of 2 that are started again"
    assert ask(tmp_path, doubt=said, restarts=1).startswith(f"fail 1: {said}; that is failure 2")


def test_a_warning_that_left_no_marker_is_a_failure(tmp_path: Path) -> None:
    """On a full disk the marker cannot be written: the run was asked to stop at step 0, and is not done."""
    assert ask(tmp_path, asked="USR1", doubt="no proof").startswith("again: no proof; failure 1")


def test_proof_is_of_this_many_steps(tmp_path: Path) -> None:
    file = tmp_path / "done.json"
    assert doubt(file, 12) == "ended without finishing: there is no proof that it reached step 12"
    for damaged in ("", "{", "[]", '{"step": "12"}', "{}"):
        file.write_text(damaged)
        assert "no proof" in doubt(file, 12)
    file.write_bytes(content(6))
    assert doubt(file, 12) == "ended without finishing: its proof says step 6, not that it reached step 12"
    assert doubt(file, 6) == ""
    assert last_step(file) == 6


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


def test_failures_count_until_a_newer_step_is_saved(tmp_path: Path) -> None:
    """A hundred failures of a run that moves on are none too many; two at the same place are."""
    for step in range(0, 1000, 10):
        assert "failure 1 of 1" in ask(tmp_path, 1, restarts=1, saved=step)
    assert ask(tmp_path, 1, restarts=1, saved=990).startswith(
        "fail 1: exit code 1; that is failure 2 since step 990 was saved"
    )
    drained(tmp_path, 995)
    assert ask(tmp_path, asked="USR1", restarts=1).startswith("again: asked")
    (tmp_path / "drained.json").unlink()
    assert "failure 1 of 1" in ask(tmp_path, 1, restarts=1, saved=995)


def test_where_nothing_can_be_written_slurms_count_bounds_the_failures(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "history.json"
    lines = [verdict(Attempt(1, "x", number=n), gone, 2).line for n in range(3)]
    assert [line.split(":")[0] for line in lines] == ["again", "again", "fail 1"]


def test_the_newest_saved_step_is_read_as_checkpoints_are_named(tmp_path: Path) -> None:
    assert newest_saved(tmp_path / "none") == -1
    folder = Folder(tmp_path)
    assert newest_saved(tmp_path) == -1
    for step in (9, 30, 30, 20):
        manifest = Manifest(step=step, data_step=step, updates=step, world=1, files=[], atoms={})
        folder.commit(folder.saving(step, "x"), manifest)
    folder.saving(40, "x")
    assert newest_saved(tmp_path) == 30


def test_a_fault_of_no_node_is_waited_out_and_each_time_longer(tmp_path: Path) -> None:
    full = Failure(1, 75, "checkpoint of step 2 was not written", host="")
    lost = Failure(1, 75, "node n3: 0 CUDA devices visible to its 8 ranks", host="n3")
    history = tmp_path / "history.json"
    attempt = Attempt(75, "no proof", failure=full)
    assert [verdict(attempt, history, 3, 60).wait_s for _ in range(3)] == [60, 120, 240]
    assert verdict(Attempt(75, "no proof", failure=lost), tmp_path / "h", 3, 60).wait_s == 0, "go elsewhere"


def test_failures_are_bounded_and_named(tmp_path: Path) -> None:
    boom = Failure(3, 1, "ValueError: boom\nsecond line")
    assert (
        ask(tmp_path, 1, failure=boom)
        == "again: rank 3: ValueError: boom; failure 1 of 2 that are started again"
    )
    assert (
        ask(tmp_path, 137)
        == "again: a rank was killed (exit code 137); failure 2 of 2 that are started again"
    )
    assert ask(tmp_path, 5) == "fail 5: exit code 5; that is failure 3, and launch.max_restarts is 2"


def test_ranks_that_slurm_ended_after_a_failure_did_not_drain_on_request(tmp_path: Path) -> None:
    drained(tmp_path, 20)
    assert ask(tmp_path, 137).startswith("again: a rank was killed (exit code 137); failure 1")


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    mistake = Failure(0, 2, "UserError: data.path: no such file")
    assert ask(tmp_path, 2, failure=mistake) == "fail 2: rank 0: UserError: data.path: no such file"


@pytest.mark.parametrize("code", [143, 137, 1, 0])
@pytest.mark.parametrize("marked", [True, False])
def test_preemption_before_a_new_step_is_saved_costs_nothing(tmp_path: Path, code: int, marked: bool) -> None:
    if marked:
        drained(tmp_path, None)  # the ranks had started, and saw the signal before the first step
    for _ in range(5):
        assert (
            ask(tmp_path, code, asked="TERM", restarts=0)
            == "again: preempted before it could save a new step"
        )


SRUN = """srun: error: 127.0.0.12: task 3: Killed
srun: Terminating StepId=7.0
srun: error: 127.0.0.11: tasks 0-1: Terminated
"""


def test_of_a_rank_that_was_killed_srun_knows_the_node(tmp_path: Path) -> None:
    """Its peers only see it gone, and whichever of them speaks is not to blame."""
    told = Failure(0, 1, "RuntimeError: connection closed", host="127.0.0.11", lost_peer=True)
    for seen in (told, None):
        found = cause(seen, SRUN, 137)
        assert found == Failure(3, 137, "killed (srun: exit code 137)", host="127.0.0.12")
    own = Failure(0, 1, "ValueError: boom", host="127.0.0.11")
    assert cause(own, SRUN, 137) == own
    assert cause(told, "", 137) == told


@pytest.mark.parametrize(
    ("failure", "left_out_after"),
    [
        (Failure(3, 1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", "n2"), 1),
        (Failure(3, 1, "RuntimeError: NVRM: Xid (PCI:0000:65:00): 79", "n2", lost_peer=True), 1),
        (Failure(3, 70, "step 7 has not ended; rank 3 is missing: no word from it", "n2"), 1),
        (Failure(3, 1, "DistBackendError: NCCL error: unhandled system error", "n2", lost_peer=True), 2),
        (Failure(3, 1, "ValueError: boom", "n2"), 2),
        (Failure(3, 75, "/local/x: Input/output error", "n2"), 2),
        (Failure(3, 1, "RuntimeError: connection closed", "n2", lost_peer=True), None),
        (Failure(3, 75, "checkpoint was not written: No space left on device", ""), None),
    ],
    ids=["ecc", "xid", "silent", "nccl", "crash", "disk", "lost peer", "shared disk"],
)
def test_a_node_whose_ranks_fail_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Failure,
    left_out_after: int | None,
) -> None:
    """With a spare node; the whole of what the job script asks, attempt by attempt."""
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    for name in ("FAILURE", "BLAME", "DONE"):
        monkeypatch.setenv(f"TRAINSYS_{name}_FILE", str(tmp_path / name.lower()))
    (tmp_path / "failure").write_text(json.dumps(asdict(failure)))
    for attempt in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        main(["run.yaml", "--job", ".", "--code", str(failure.code), "--nodes", "2", "--usable", "3"])
        said = capsys.readouterr().out
        assert said.startswith(f"again: rank 3{' on n2' if failure.host else ''}: {failure.message}; failure")
        expected = left_out_after is not None and attempt + 1 >= left_out_after
        assert ("\nexclude n2: n2: rank 3: " in said) == expected, f"attempt {attempt}: {said}"
        assert ("\nwait " in said) == (failure.code == 75 and not failure.host)


def test_a_config_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake, as for the ranks; but a file system that fails is tried again, and not for ever."""
    asked = [str(tmp_path / "run.yaml"), "--job", str(tmp_path), "--code", "143"]
    (tmp_path / "run.yaml").write_text("model: {}\n")
    main(asked)
    assert capsys.readouterr().out.startswith("fail 2: ")

    def stale(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    main(asked)
    assert capsys.readouterr().out.startswith("again: ")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    main(asked)
    assert capsys.readouterr().out.startswith("fail 2: ")
