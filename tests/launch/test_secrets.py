"""A secret given to a run is in none of the files that the run, its job or a plan leave behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from trainsys.cli import main
from trainsys.config.loader import load_run, resolved_yaml
from trainsys.config.secrets import MASK, assigned_secrets, is_secret, without_secrets
from trainsys.config.text import dump
from trainsys.launch import job, slurm
from trainsys.sweep.config import SweepConfig
from trainsys.sweep.points import candidates

ROOT = Path(__file__).resolve().parents[2]
VALUE = "hunter2-is-the-value"
RUN = """
name: small
model: {n_layers: 1, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 2, seq_len: 32, global_batch: 4, micro_batch: 2, device: cpu, dtype: fp32, threads: 1}
data: {source: synthetic}
checkpoint: {every: 1}
telemetry: {console: plain, tensorboard: %s, wandb: {mode: "%s"}}
launch: {devices_per_node: 2}
"""


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tensorboard = "true" if find_spec("tensorboard") else "false"
    (tmp_path / "run.yaml").write_text(RUN % (tensorboard, "offline" if find_spec("wandb") else "off"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def holding(folder: Path) -> list[str]:
    """Files below ``folder`` with the value in them, whatever their kind."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(files) > 2
    return sorted(str(p.relative_to(folder)) for p in files if VALUE.encode() in p.read_bytes())


def test_a_run_writes_it_nowhere_and_its_ranks_have_it(small: Path) -> None:
    """By a mapping and by a dotted name; config, events, W&B, TensorBoard, checkpoints, summary and what is printed."""
    (small / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    assert os.environ['MY_VARIABLE'] == os.environ['WANDB_API_KEY']\n"
        "    open('seen', 'a').write(os.environ['RANK'])\n"
    )
    path = os.pathsep.join([str(small), os.environ.get("PYTHONPATH", str(ROOT))])
    done = subprocess.run(
        [
            sys.executable, "-m", "trainsys", "launch", "run.yaml", "--on", "local",
            f"launch.env={{WANDB_API_KEY: {VALUE}}}", f"launch.env.MY_VARIABLE={VALUE}",
        ],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set((small / "seen").read_text()) == {"0", "1"}
    assert VALUE not in done.stdout + done.stderr
    assert list(small.glob("runs/small-*/events/*"))
    assert list(small.glob("runs/checkpoints/small/*"))
    assert holding(small / "runs") == []
    assert list(small.glob("runs/small-*/wandb/offline-run-*")) or not find_spec("wandb")


def test_a_run_that_is_started_by_hand_writes_it_nowhere(small: Path) -> None:
    """Without a launcher the overrides are on the command line of the run itself, which its record shows."""
    (small / "own.yaml").write_text(f"include: run.yaml\nlaunch: {{env: {{MY_VARIABLE: {VALUE}}}}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "trainsys", "train", "own.yaml", f"launch.env={{WANDB_API_KEY: {VALUE}}}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert VALUE not in done.stdout + done.stderr
    assert holding(small / "runs") == []
    (config,) = small.glob("runs/small-*/config.yaml")
    assert yaml.safe_load(config.read_text())["launch"]["env"] == {"MY_VARIABLE": MASK, "WANDB_API_KEY": MASK}


def test_a_slurm_job_has_it_in_one_file_of_its_owner(small: Path) -> None:
    made = job.make("run.yaml", [f"launch.env={{WANDB_API_KEY: {VALUE}, GREETING: it is 'me'}}"])
    text = slurm.render(made)
    assert VALUE not in text
    script = job.write(made, "job.sbatch", text, made.first.launch.variables)
    job.record(made, "slurm", "1")
    assert holding(made.folder) == [job.ENV_FILE]
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (made.folder, made.folder / job.ENV_FILE, script)}
    assert list(modes.values()) == [0o700, 0o600, 0o700]
    line = next(line for line in text.splitlines() if job.ENV_FILE in line)
    ask = f"JOB_DIR={made.folder}; {line}\nprintenv WANDB_API_KEY GREETING"
    done = subprocess.run(["bash", "-uc", ask], capture_output=True, text=True)
    assert done.stdout.splitlines() == [VALUE, "it is 'me'"]


def test_without_variables_there_is_no_such_file(small: Path) -> None:
    made = job.make("run.yaml")
    assert job.ENV_FILE not in slurm.render(made)
    job.write(made, "job.sbatch", "", made.first.launch.variables)
    assert not (made.folder / job.ENV_FILE).exists()


SKY = """#!/usr/bin/env bash
echo "$@" > "$(dirname "$0")/arguments"
printenv WANDB_API_KEY > "$(dirname "$0")/environment"
"""


def test_skypilot_takes_it_from_the_environment_of_its_client(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "bin").mkdir()
    (small / "bin/sky").write_text(SKY)
    (small / "bin/sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{small / 'bin'}:/usr/bin:/bin")
    assert main(["launch", "run.yaml", "--on", "skypilot", f"launch.env.WANDB_API_KEY={VALUE}"]) == 0
    (folder,) = small.glob("runs/jobs/*")
    assert holding(folder) == []
    assert "secrets:\n  WANDB_API_KEY: null\n" in (folder / "task.yaml").read_text()
    assert "--secret=WANDB_API_KEY" in (small / "bin/arguments").read_text()
    assert VALUE not in (small / "bin/arguments").read_text()
    assert (small / "bin/environment").read_text() == f"{VALUE}\n"


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_kubernetes_writes_it_nowhere(small: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    given = [f"launch.env.WANDB_API_KEY={VALUE}", "launch.container=image", f"launch.kubernetes.kind={kind}"]
    assert main(["launch", "run.yaml", "--on", "kubernetes", *given]) == 2
    assert VALUE not in "".join(capsys.readouterr())
    assert not (small / "runs").exists()


def test_what_is_printed_hides_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"launch.env.MY_VARIABLE={VALUE}"]
    for command in (
        ["config", "show"],
        ["launch", "--on", "local", "--dry-run"],
        ["launch", "--on", "slurm", "--dry-run"],
    ):
        assert main([*command, "run.yaml", *given]) == 0
        said = "".join(capsys.readouterr())
        assert "MY_VARIABLE" in said
        assert VALUE not in said


def test_a_plan_leaves_it_out_and_says_so(small: Path) -> None:
    given = [f"launch.env={{WANDB_API_KEY: {VALUE}, NCCL_DEBUG: WARN}}", "train.device=cuda"]
    plan = ["plan", "run.yaml", "--cluster", "dgx-h100", "--gpus", "2", "--write", "planned.yaml"]
    assert main([*plan, *given]) == 0
    text = (small / "planned.yaml").read_text()
    assert VALUE not in text
    assert "# launch.env.WANDB_API_KEY is not written down: give it to trainsys launch\n" in text
    assert load_run("planned.yaml").launch.variables == {"NCCL_DEBUG": "WARN"}


def test_a_sweep_tells_candidates_apart_without_showing_it(small: Path) -> None:
    points = [{"launch.env.A_KEY": VALUE}, {"launch.env.A_KEY": "other"}, {"launch.env.NCCL_ALGO": "Ring"}]
    sweep = SweepConfig.model_validate({"name": "s", "run": "run.yaml", "steps": 2, "points": tuple(points)})
    found = candidates(sweep)
    assert len({c.key for c in found}) == 3
    assert [c.label for c in found] == [f"A_KEY={MASK}", f"A_KEY={MASK}", "NCCL_ALGO=Ring"]


def test_a_struck_out_value_is_not_run_with(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run("run.yaml", [f"launch.env.WANDB_API_KEY={VALUE}"])
    (small / "again.yaml").write_text(resolved_yaml(run))
    assert main(["launch", "again.yaml", "--on", "local"]) == 2
    assert "launch.env.WANDB_API_KEY: its value is struck out in this file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        (f"launch.env={{A: {VALUE}}}", "launch.env=***"),
        (f"launch.env.A={VALUE}", "launch.env.A=***"),
        (f"launch.setup=[export A_TOKEN={VALUE}]", "launch.setup=***"),
        (f"--api-key={VALUE}", "--api-key=***"),
        (f"https://me:{VALUE}@host/x", "https://***@host/x"),
        ("launch.environment=x", "launch.environment=x"),
        ("data.tokenizer=tokenizer.json", "data.tokenizer=tokenizer.json"),
    ],
)
def test_command_lines(word: str, shown: str) -> None:
    assert without_secrets(["python", word]) == ["python", shown]


@pytest.mark.parametrize(
    "given", ["launch.env={A: 20406080}", "launch.env.A=20406080", "launch.env.a-b=20406080", "launch.env=20406080"]
)
def test_a_mistake_is_told_without_the_value(capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert main(["launch", "run.yaml", "--on", "local", given]) == 2
    said = capsys.readouterr().err
    assert "launch.env" in said
    assert "20406080" not in said


def test_names() -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password"):
        assert is_secret(name)
    for name in ("NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
        assert not is_secret(name)
    assert assigned_secrets(
        ["export A_KEY='x' B=1", "A_TOKEN=$(cat f)", "A_PASS=", "TOKENIZERS_PARALLELISM=1"]
    ) == ["A_KEY"]


def test_a_config_with_variables_dumps_and_loads() -> None:
    run = load_run("run.yaml", ["launch.env.A=b"])
    assert run.launch.variables == {"A": "b"}
    assert "b" not in dump(run.launch.model_dump(mode="json")["env"]).split()
