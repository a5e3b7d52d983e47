"""Job files for every scheduler: golden files (which are the templates people copy), schemas, refusals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
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


def test_what_a_run_uses_is_mounted_into_its_container_and_its_environment_wins(small: Path) -> None:
    for name in ("data", "host"):
        (small / name).mkdir()
    asked = [
        "launch.container=image.sqsh",
        "launch.mounts=[/scratch:/scratch]",
        "launch.env.NCCL_DEBUG=WARN",
        "data.source=shards",
        "data.path=data/part-*.bin",
        "data.cache_dir=/scratch/cache",
        f"checkpoint.folder={small}/host/checkpoints",
    ]
    made = job.make("run.yaml", asked)
    text = slurm.render(replace(made, runs=tuple(map(job.settled, made.runs))))
    (line,) = (x for x in text.splitlines() if x.startswith("SRUN_OPTIONS="))
    words = dict(w.split("=", 1) for w in shlex.split(line.removeprefix("SRUN_OPTIONS=(").rstrip(")")))
    mounts = words["--container-mounts"].split(",")
    for folder in ("runs", "data", "host/checkpoints"):
        assert f"{small}/{folder}:{small}/{folder}" in mounts
    assert mounts[-1] == "/scratch:/scratch"
    assert not any("cache" in mount or "jobs" in mount for mount in mounts), "inside of another one"
    assert words["--container-workdir"] == str(made.folder)
    passed = words["--container-env"].split(",")
    assert {"NCCL_DEBUG", "PYTHONPATH", "TRAINSYS_DONE_FILE", "OMP_NUM_THREADS"} <= set(passed)
    exported = {x.split("=")[0].removeprefix("export ") for x in text.splitlines() if "export TRAINSYS_" in x}
    assert {name for name in exported if name.endswith(("FILE", "TASK"))} <= set(passed), "the script's own"
    assert "PYTHON=(python3)" in text.splitlines()
    assert f"AFTER_PYTHON={sys.executable}" in text.splitlines(), "the script runs outside of the container"
    assert f"export PYTHONPATH={made.code}" in text.splitlines(), "nothing of the host's behind it"


def test_weights_to_begin_with_reach_the_ranks_wherever_they_start(small: Path) -> None:
    (small / "weights").mkdir()
    made = job.make("run.yaml", ["launch.container=image.sqsh", "train.init_from=weights"])
    settled = tuple(map(job.settled, made.runs))
    assert settled[0].train.init_from == str(small / "weights")
    assert f"{small}/weights:{small}/weights" in slurm.render(replace(made, runs=settled))


@pytest.mark.parametrize("by", ["launch.python=host", "launch.venv=env"])
def test_the_hosts_python_is_mounted_with_what_it_was_made_from(small: Path, by: str) -> None:
    (small / "env/bin").mkdir(parents=True)
    (small / "env/bin/python").symlink_to(os.path.realpath(sys.executable))
    made = job.make("run.yaml", ["launch.container=image.sqsh", by])
    text = slurm.render(made)
    assert f"PYTHON=({made.python})" in text.splitlines()
    base = Path(os.path.realpath(sys.executable)).parent.parent
    for folder in (Path(made.python).parent.parent, base):
        assert f"{folder}:{folder}" in text or str(folder) == "/usr"


def test_paths_of_a_job_are_absolute(small: Path) -> None:
    """Ranks may start in any folder: none may look for its data, or save, somewhere else."""
    (small / "tok.json").write_text("{}")
    asked = [
        "data.source=text",
        "data.path=corpus-*.txt",
        "data.tokenizer=tok.json",
        "data.cache_dir=cache",
        "checkpoint.local_dir=nvme",
        "checkpoint.resume=old/step_0000000007",
        "train.device=auto",
    ]
    (small / "old/step_0000000007").mkdir(parents=True)
    run = job.settled(load_run("run.yaml", asked))
    assert run.telemetry.out == f"{small}/runs"
    assert run.checkpoint_folder == f"{small}/runs/checkpoints/small"
    assert run.checkpoint.local_dir == f"{small}/nvme"
    assert run.checkpoint.resume == f"{small}/old/step_0000000007"
    assert (run.data.path, run.data.cache_dir, run.data.tokenizer) == (
        f"{small}/corpus-*.txt",
        f"{small}/cache",
        f"{small}/tok.json",
    )
    assert run.train.device == "cuda", "a node without its device is not trained on by its cores"
    assert job.settled(run) == run
    left = job.settled(load_run("run.yaml", ["data.source=hf", "data.path=org/set"]))
    assert (left.data.path, left.data.tokenizer, left.checkpoint.resume) == ("org/set", "bytes", "auto")


def test_a_folder_with_a_space_or_a_percent_sign(small: Path) -> None:
    text = slurm.render(job.make("run.yaml", ['telemetry.out="a b/50%j"']))
    (line,) = (x for x in text.splitlines() if "--output=" in x and x.startswith("#SBATCH"))
    assert line.startswith(f'#SBATCH --output="{small}/a b/50%%j/jobs/small-')
    assert line.endswith('/logs/slurm-0.out"')
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_more_tasks_than_an_array_takes_are_several_arrays(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of whose scripts knows which of the submitted tasks it begins with; a limit is one of all together."""
    asked: list[tuple[str, ...]] = []

    def slurm_says(*command: str, stdin: str | None = None) -> str:
        asked.append(command)
        if command[0] == "sbatch" and "--parsable" in command:
            return f"{100 + len(asked)}\n"
        return "MaxArraySize            = 3\n" if command[:2] == ("scontrol", "show") else ""

    monkeypatch.setattr(slurm, "ask", slurm_says)
    monkeypatch.setattr(slurm.shutil, "which", lambda _: "/usr/bin/sbatch")
    made = job.make("run.yaml", ["launch.array_limit=2"], ["optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3"])
    assert slurm.launch(made, dry_run=False, detach=True) == 0
    submitted = [words for words in asked if "--parsable" in words]
    assert [Path(words[-1]).name for words in submitted] == ["job.sbatch", "job-3.sbatch", "job-6.sbatch"]
    ids = json.loads((made.folder / "job.json").read_text())["id"].split(",")
    assert len(ids) == 3
    assert [words[2] for words in submitted[1:]] == [f"--dependency=afterany:{i}" for i in ids[:2]]
    scripts = [Path(words[-1]).read_text().splitlines() for words in submitted]
    assert [next(x for x in s if x.startswith("FIRST_TASK=")) for s in scripts] == [
        f"FIRST_TASK={n}" for n in (0, 3, 6)
    ]
    arrays = [[x for x in s if "--array" in x] for s in scripts]
    assert arrays == [["#SBATCH --array=0-2%2"], ["#SBATCH --array=0-2%2"], []]
    assert len({next(x for x in s if "--output" in x) for s in scripts}) == 3
    assert len(list((made.folder / "runs").glob("*.yaml"))) == 7


def test_the_job_script_names_its_own_task_and_never_the_whole_array() -> None:
    """SLURM_JOB_ID of an array's last task is the number of the array."""
    body = (ROOT / "launchers/slurm/train.sbatch").read_text().partition("# ==== the same")[2]
    assert [line for line in body.splitlines() if "$SLURM_JOB_ID" in line] == ["id=${id:-$SLURM_JOB_ID}"]
    for command in ("scancel", "scontrol requeue", "scontrol update", "scontrol show job"):
        uses = [x for x in body.splitlines() if command in x and not x.lstrip().startswith("#")]
        assert uses
        assert all('$id"' in x for x in uses), uses


@pytest.mark.parametrize(
    "state", ["PREEMPTED", "REVOKED", "TIMEOUT", "LAUNCH_FAILED", "COMPLETED", "NEW_ONE"]
)
def test_the_follower_ends_on_every_final_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    answers = iter(["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "RUNNING", state])
    monkeypatch.setattr(slurm, "states", lambda _: {"7": (next(answers), "n1")})
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    assert slurm.follow("7", tmp_path) == (0 if state == "COMPLETED" else 1)
    assert f"job 7: {state} n1" in capsys.readouterr().out


def test_gpus_are_asked_for_where_a_run_uses_them() -> None:
    lines = slurm.render(made()).splitlines()
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "SRUN_OPTIONS=(--cpu-bind=cores --gpu-bind=none)" in lines
    own = slurm.render(
        made("launch.cpu_bind=map_cpu:0", "launch.gpu_bind=closest", "launch.srun=[--mem-bind=local]")
    )
    assert "SRUN_OPTIONS=(--cpu-bind=map_cpu:0 --gpu-bind=closest --mem-bind=local)" in own.splitlines()


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
