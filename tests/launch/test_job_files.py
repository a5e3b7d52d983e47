"""Job files for every scheduler: golden files (which are the templates people copy), schemas, refusals."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainsys.cli import main
from trainsys.config.loader import load_run
from trainsys.errors import UserError
from trainsys.launch import job, kubernetes, skypilot, slurm

ROOT = Path(__file__).resolve().parents[2]

BASE = [
    "parallel.tp=8",
    "data.path=/workspace/data",
    "launch.nodes=4",
    "launch.devices_per_node=8",
    "resilience.elastic=false",
]
IMAGE = "launch.container=registry.example/trainsys:0.1"
KUBE = [
    IMAGE,
    "launch.kubernetes.queue=research",
    "launch.kubernetes.claim=work",
    "launch.cpus_per_rank=8",
    "launch.memory=512G",
    'launch.time="2-00:00:00"',
    "launch.env.NCCL_DEBUG=WARN",
    "launch.kubernetes.secrets={WANDB_API_KEY: {name: wandb, key: api-key}}",
    "launch.kubernetes.resources={rdma/hca: '8'}",
    "launch.kubernetes.capabilities=[IPC_LOCK]",
]
JOBSET = [*KUBE, "launch.kubernetes.kind=jobset"]
SKY = [
    "launch.skypilot.accelerator=H100",
    "launch.skypilot.use_spot=true",
    "launch.skypilot.storage={/checkpoints: {name: llama3-8b-checkpoints}}",
    "checkpoint.folder=/checkpoints/llama3-8b",
]

RUN = """
name: small
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 12, seq_len: 32, global_batch: 8, micro_batch: 1, device: cpu, dtype: fp32}
data: {source: synthetic}
launch: {nodes: 2, devices_per_node: 2}
"""


def made(*overrides: str) -> job.Job:
    """A job that was submitted at a time that never changes."""
    return replace(
        job.make("train/llama3-8b", [*BASE, *overrides]), folder=Path("/runs/jobs/llama3-8b-20260131-142501")
    )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "render", "overrides"),
    [
        ("kubernetes/trainjob.yaml", kubernetes.render, KUBE),
        ("kubernetes/jobset.yaml", kubernetes.render, JOBSET),
        ("skypilot/train.yaml", skypilot.render, SKY),
    ],
)
def test_the_shipped_files_are_what_launch_writes(file: str, render: Any, overrides: list[str]) -> None:
    assert render(made(*overrides)) == (ROOT / "launchers" / file).read_text()


def test_the_config_in_a_manifest_loads_back(tmp_path: Path) -> None:
    whole = made(*KUBE)
    _, train_job = yaml.safe_load_all(kubernetes.render(whole))
    env = {e["name"]: e.get("value") for e in train_job["spec"]["trainer"]["env"]}
    file = tmp_path / "run.yaml"
    file.write_text(env["TRAINSYS_RUN"])
    loaded = load_run(file)
    assert loaded.model_copy(update={"launch": whole.first.launch}) == whole.first


def test_slurm_script_says_what_was_asked_for(small: Path) -> None:
    text = slurm.render(
        job.make(
            "run.yaml",
            [
                "launch.partition=gpu",
                "launch.account=lab",
                'launch.time="1-02:00:00"',
                "launch.exclude=[n7,n9]",
                "launch.env.GREETING='it is me'",
                "launch.setup=[module load cuda]",
                "launch.interface=ib0",
                "launch.container=image.sqsh",
            ],
        )
    )
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --time=1-02:00:00",
        "#SBATCH --exclude=n7,n9",
        "#SBATCH --signal=B:USR1@180",
        "#SBATCH --requeue",
        '. "$JOB_DIR/env.sh"    # GREETING',
        "module load cuda",
        "export TRAINSYS_INTERFACE=ib0",
    ):
        assert line in text.splitlines()
    assert "--gpus-per-node" not in text  # train.device=cpu
    assert "--container-image=image.sqsh" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (small / "runs").exists()


def test_gpus_are_asked_for_where_a_run_uses_them() -> None:
    assert "#SBATCH --gpus-per-node=8" in slurm.render(made()).splitlines()


def test_a_grid_is_an_array_of_runs_that_differ_in_name_and_value(small: Path) -> None:
    made = job.make("run.yaml", [], ["optim.lr=1e-3,3e-4", "parallel.tp=1,2"])
    assert [r.name for r in made.runs] == [f"small-{n:04d}" for n in range(4)]
    assert [(r.optim.lr, r.parallel.tp) for r in made.runs] == [(1e-3, 1), (1e-3, 2), (3e-4, 1), (3e-4, 2)]
    assert len({r.checkpoint_folder for r in made.runs}) == 4
    text = slurm.render(made)
    assert "#SBATCH --array=0-3" in text
    assert "#SBATCH --job-name=small\n" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nproc", "2"], "--nproc"),
        (["--grid", "optim.lr"], "--grid optim.lr"),
        (["--grid", "launch.nodes=1,2"], "--grid launch.nodes=2"),
        (["parallel.tp=3"], "launch.nodes=2, 2 ranks a node"),
        (["launch.devices_per_node=null"], "launch.devices_per_node"),
        (["launch.time=soon"], "launch.time"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["launch", "run.yaml", *arguments, "--on", "slurm", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("on", "tool"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("skypilot", "sky")]
)
def test_a_missing_client_is_one_line(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, on: str, tool: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    image = [IMAGE] if on == "kubernetes" else []
    assert main(["launch", "run.yaml", *image, "--on", on]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trainsys: error: {tool}: not found")
    assert len(error.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(small: Path) -> None:
    (small / "file").write_text("")
    made = job.make("run.yaml", ["telemetry.out=file/runs"])
    with pytest.raises(UserError, match="cannot be written: Not a directory; set telemetry"):
        job.write(made, "job.sbatch", "")


def test_the_snapshot_holds_the_code(small: Path) -> None:
    made = job.make("run.yaml")
    path = job.write(made, "job.sbatch", "text")
    assert path.read_text() == "text"
    assert made.code is not None
    copied = (made.code / "trainsys/launch/job.py").read_text()
    assert copied == Path(job.__file__).read_text()
    assert load_run(made.folder / "runs/0.yaml") == made.first
    assert job.make("run.yaml", ["launch.snapshot=false"]).code is None
