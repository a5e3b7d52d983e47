"""The run's folder: made once, reloadable, free of secrets."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from trainsys.config.model import ModelConfig
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.telemetry import run_dir as module
from trainsys.telemetry.run_dir import (
    create_run_dir,
    safe_variables,
    write_config,
    write_environment,
    write_summary,
)


def test_name_and_latest(tmp_path: Path) -> None:
    first = create_run_dir(tmp_path / "runs", "demo")
    second = create_run_dir(tmp_path / "runs", "demo")
    assert first != second
    assert re.fullmatch(r"demo-\d{8}-\d{6}-[0-9a-f]{4}", first.name)
    assert (first / "events").is_dir()
    latest = tmp_path / "runs" / "latest"
    assert latest.is_symlink()
    assert latest.resolve() == second
    assert os.readlink(latest) == second.name  # relative, so that the folder may be moved


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_real_thing_called_latest_is_left_alone(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "latest"
    if kind == "folder":
        mine.mkdir()
    else:
        mine.write_text("my notes")
    run_dir = create_run_dir(tmp_path, "demo")
    assert not mine.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["latest", run_dir.name])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"telemetry\.out=.*file/runs.*writable folder"):
        create_run_dir(tmp_path / "file" / "runs", "demo")


def test_config_can_be_run_again(tmp_path: Path) -> None:
    model = ModelConfig(name="t", n_layers=1, d_model=8, n_heads=2, d_ff=16, vocab=32, max_seq_len=64)
    config = RunConfig.model_validate({"model": model, "train": {"seq_len": 32}})
    loaded = yaml.safe_load(write_config(tmp_path, config).read_text())
    assert RunConfig.model_validate_json(json.dumps(loaded)) == config


def test_secrets_are_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2"
    for name in (
        "SLURM_JWT",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "NCCL_TOKEN",
        "HOME_MADE",
        "TORCH_PASSWORD",
    ):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("TORCH_HOME", f"https://me:{secret}@host/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(
        sys,
        "orig_argv",
        ["python", "-m", "trainsys", f"--api-key={secret}", "--token", secret, f"a.secret={secret}"],
    )
    text = write_environment(tmp_path, {"device": "none"}).read_text()
    assert secret not in text
    found = json.loads(text)
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert found["variables"]["TORCH_HOME"] == "https://***@host/x"
    assert found["device"] == "none"
    assert found["packages"]["msgspec"]
    assert found["cpus"] >= 1


def test_only_listed_variables() -> None:
    assert safe_variables({"RANK": "1", "RANKING": "x", "PATH": "p", "OMP_NUM_THREADS": "2"}) == {
        "OMP_NUM_THREADS": "2",
        "RANK": "1",
    }


def test_summary_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(tmp_path, {"loss": 1.0})
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_summary(tmp_path, {"loss": 2.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
