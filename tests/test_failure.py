"""The rank's side of a failure, with plain processes that stand in for ranks (no torch, no torchrun)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainsys.blame import this_node
from trainsys.errors import UserError, fault_of
from trainsys.failure import FAILURE_FILE, Failure, error_lines, guard, read_failure

ROOT = Path(__file__).resolve().parents[1]
SETUP = (
    "import os, sys, time; from trainsys.failure import guard; "
    "from trainsys.errors import MachineFault, UserError\n"
)


def ranks(bodies: list[str], report: Path | None, **more: str) -> list[tuple[int, str]]:
    """Run each body under `guard` as one rank of a world; (exit code, stderr) of each."""
    env = {k: v for k, v in os.environ.items() if k not in (FAILURE_FILE, "TORCHELASTIC_ERROR_FILE")}
    env |= {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(len(bodies)), **more}
    if report is not None:
        env[FAILURE_FILE] = str(report)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"{SETUP}with guard():\n    {body}\n"],
            env={**env, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank, body in enumerate(bodies)
    ]  # fmt: skip
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    return [(code, err) for err, code in ended]


def test_of_many_ranks_that_fail_alike_one_prints(tmp_path: Path) -> None:
    report = tmp_path / "failure.json"
    done = ranks(["raise UserError('first\\nsecond')"] * 5, report)
    assert [code for code, _ in done] == [2] * 5
    assert "".join(err for _, err in done) == "trainsys: error: first\ntrainsys: error: second\n"
    failure = read_failure(report)
    assert failure is not None
    assert failure.code == 2
    assert done[failure.rank][1] != ""
    assert list(tmp_path.iterdir()) == [report]


def test_a_machines_fault_is_one_line_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    report = tmp_path / "failure.json"
    done = ranks(["raise MachineFault('node-7: its disk is full')"] * 3, report)
    assert [code for code, _ in done] == [75] * 3
    assert "".join(err for _, err in done) == "trainsys: error: node-7: its disk is full\n"
    failure = read_failure(report)
    assert failure is not None
    assert failure.code == 75


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS"])
@pytest.mark.parametrize(
    "body",
    [
        "raise OSError(errno.{}, 'it says', '/runs/x')",
        # As everywhere where a file is opened for the user: one line that says what it was for.
        "try: raise OSError(errno.{}, 'it says')\n    "
        "except OSError as e: raise UserError('/runs/x: it says') from None",
    ],
    ids=["raw", "explained"],
)
def test_what_a_disk_does_is_a_machines_fault_wherever_it_is_met(
    tmp_path: Path, name: str, body: str
) -> None:
    (done,) = ranks([f"import errno\n    {body.format(name)}"], tmp_path / "failure.json")
    assert done == (75, "trainsys: error: /runs/x: it says\n")
    failure = read_failure(tmp_path / "failure.json")
    assert failure is not None
    assert failure.host == ("" if name in ("ENOSPC", "EDQUOT") else this_node()), "a full disk is no node's"


def test_a_path_that_is_wrong_stays_a_mistake(tmp_path: Path) -> None:
    body = "try: open('/nowhere/x')\n    except OSError as e: raise UserError('x: no such file') from None"
    assert ranks([body], None) == [(2, "trainsys: error: x: no such file\n")]
    assert isinstance(fault_of(KeyError("x")), KeyError)


def test_a_rank_that_waits_for_one_that_failed_is_not_the_cause(tmp_path: Path) -> None:
    """The rendezvous of the others fails after the mistake of one, and says less."""
    report = tmp_path / "failure.json"
    meet = "class DistStoreError(RuntimeError): pass\n    try: raise DistStoreError('timeout')\n    "
    meet += "except RuntimeError as e: raise MachineFault('no meeting') from e"
    done = ranks([meet, "time.sleep(1.0); raise UserError('data.path: no such file')"], report)
    assert [code for code, _ in done] == [75, 2]
    failure = read_failure(report)
    assert failure is not None
    assert (failure.rank, failure.code) == (1, 2)


@pytest.mark.timing
def test_a_crash_is_one_block_that_names_the_rank(tmp_path: Path) -> None:
    report, lost = tmp_path / "failure.json", tmp_path / "lost"
    until = "while not os.path.exists({!r}): time.sleep(0.01)\n    {}".format
    # One rank sees a closed connection before the cause is told, another fails after: both consequences.
    first = f"open({str(lost)!r}, 'w'); raise RuntimeError('[gloo] Connection closed by peer [::1]:1234')"
    cause = until(str(lost), "time.sleep(0.5); raise ValueError('boom')")
    later = until(str(report), "raise KeyError('later')")
    done = ranks([first, cause, later], report)
    assert [code for code, _ in done] == [1, 1, 1]
    assert done[0][1] == done[2][1] == ""
    lines = done[1][1].splitlines()
    assert lines[0] == "trainsys: rank 1 of 3 failed"
    assert lines[-1] == "ValueError: boom"
    assert "failure.py" not in done[1][1]
    assert read_failure(report) == Failure(rank=1, code=1, message="ValueError: boom", host=this_node())


def test_under_plain_torchrun_its_own_folder_serves(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    error_file = str(tmp_path / "0" / "error.json")
    done = ranks(["raise UserError('same')"] * 3, None, TORCHELASTIC_ERROR_FILE=error_file)
    assert sorted(err for _, err in done) == ["", "", "trainsys: error: same\n"]


def test_with_no_file_to_agree_by_rank_0_tells_of_a_users_mistake() -> None:
    done = ranks(["raise UserError('same')"] * 2, None)
    assert done == [(2, "trainsys: error: same\n"), (2, "")]


def test_a_file_that_cannot_be_made_silences_nobody(tmp_path: Path) -> None:
    done = ranks(["raise UserError('x')"], tmp_path / "gone" / "failure.json")
    assert done == [(2, "trainsys: error: x\n")]


@pytest.mark.timing
def test_a_failing_rank_leaves_at_once_whatever_waits_at_exit(tmp_path: Path) -> None:
    hang = "import threading; threading.Thread(target=time.sleep, args=(600,)).start(); raise ValueError('x')"
    done = ranks([hang, "pass"], tmp_path / "failure.json")
    assert done[0][0] == 1
    assert done[1] == (0, "")


def test_an_interrupt_is_silent(tmp_path: Path) -> None:
    done = ranks(["raise KeyboardInterrupt"] * 2, tmp_path / "failure.json")
    assert done == [(130, ""), (130, "")]


def test_one_process_raises_system_exit(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("RANK", "WORLD_SIZE", FAILURE_FILE, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as left, guard():
        raise RuntimeError("connection reset")
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("Traceback")
    with pytest.raises(SystemExit) as left, guard(), guard():
        raise UserError("bad")
    assert left.value.code == 2
    assert capsys.readouterr().err == "trainsys: error: bad\n"


def test_no_failure_no_trace(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "f"))
    with guard():
        pass
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 1}', json.dumps({"a": 1})])
def test_a_damaged_report_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    assert read_failure(tmp_path / "f") is None
    assert read_failure(tmp_path / "missing") is None


def test_error_lines() -> None:
    assert error_lines(UserError("a\nb")) == "trainsys: error: a\ntrainsys: error: b\n"
    assert error_lines(UserError("")) == "trainsys: error: \n"
