"""The proof that a run is done is written once its last step is, and never before."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.slurm import RUN
from trainsys.launch.proof import DONE_FILE, last_step
from trainsys.train import main

SMALL = [
    "train.steps=2",
    "checkpoint.every=1",
    "telemetry.console=off",
    "data.source=synthetic",
    "data.path=null",
]


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(DONE_FILE, str(tmp_path / "done.json"))
    return tmp_path / "done.json"


def test_a_run_that_reached_its_last_step_proves_it(proof: Path) -> None:
    assert main.train("run.yaml", SMALL) == 0
    assert last_step(proof) == 2
    proof.unlink()
    assert main.train("run.yaml", SMALL) == 0
    assert last_step(proof) == 2, "a restart after the last save finds nothing left to do, and says so too"


@pytest.mark.parametrize("reached", [0, 1])
def test_a_run_that_stopped_before_proves_nothing(
    proof: Path, monkeypatch: pytest.MonkeyPatch, reached: int
) -> None:
    monkeypatch.setattr(main, "run", lambda *_: (reached, ""))
    assert main.train("run.yaml", SMALL) == 0
    assert not proof.exists()


def test_only_rank_0_proves(proof: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(main, "run", lambda *_: (2, ""))
    assert main.train("run.yaml", SMALL) == 0
    assert not proof.exists()


def test_a_proof_that_cannot_be_written_is_not_success(proof: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DONE_FILE, str(proof.parent / "gone" / "done.json"))
    monkeypatch.setattr(main, "run", lambda *_: (2, ""))
    with pytest.raises(OSError, match="No such file"):
        main.train("run.yaml", SMALL)
