"""The table of options against the code: what is used changes the job, what is not is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainsys.cli import main
from trainsys.config.launch import LaunchConfig
from trainsys.config.loader import load_run
from trainsys.errors import UserError
from trainsys.launch import job, kubernetes, options, skypilot, slurm
from trainsys.launch.local import launch
from trainsys.launch.options import BACKENDS, USED, Backend

ROOT = Path(__file__).resolve().parents[2]
RUN = """
name: small
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 1, seq_len: 32, global_batch: 16, device: cpu, dtype: fp32}
data: {source: synthetic}
"""
# For every option a value that is not its default; of a section, by dotted name.
VALUES = {
    "nodes": "2",
    "devices_per_node": "4",
    "cpus_per_rank": "3",
    "memory": "7G",
    "time": '"1:00:00"',
    "warn_s": "90",
    "max_restarts": "7",
    "retry_wait_s": "5",
    "account": "lab",
    "partition": "gpu",
    "qos": "high",
    "constraint": "h100",
    "reservation": "mine",
    "exclude": "[n7]",
    "array_limit": "4",
    "sbatch": "[--mail-type=END]",
    "srun": "[--mpi=none]",
    "cpu_bind": "sockets",
    "gpu_bind": "closest",
    "python": "host",
    "venv": "venv",
    "container": "other/image",
    "mounts": "[/a:/b]",
    "setup": "[module load cuda]",
    "env": "{NAME_OF_IT: value}",
    "interface": "ib0",
    "port": "12345",
    "snapshot": "false",
    "preflight": "true",
    "cluster": "dgx-h100",
    "evict_share": "0.25",
    "kubernetes.kind": "jobset",
    "kubernetes.namespace": "research",
    "kubernetes.runtime": "torch-distributed",
    "kubernetes.queue": "gpus",
    "kubernetes.claim": "work",
    "kubernetes.mount": "/elsewhere",
    "kubernetes.volumes": "[{path: /data, claim: corpora}]",
    "kubernetes.shm": "64Gi",
    "kubernetes.cpu": "9",
    "kubernetes.memory": "9Gi",
    "kubernetes.device": "amd.com/gpu",
    "kubernetes.resources": "{rdma/hca: '8'}",
    "kubernetes.node_selector": "{a: b}",
    "kubernetes.affinity": "{podAffinity: {}}",
    "kubernetes.tolerations": "[{key: a}]",
    "kubernetes.topology": "{exclusive: rack}",
    "kubernetes.capabilities": "[IPC_LOCK]",
    "kubernetes.security_context": "{runAsUser: 1}",
    "kubernetes.service_account": "trainer",
    "kubernetes.image_pull_secrets": "[registry]",
    "kubernetes.priority_class": "high",
    "kubernetes.secrets": "{A_TOKEN: {name: a, key: b}}",
    "kubernetes.patch": "{Pod: {spec: {hostNetwork: true}}}",
    "skypilot.accelerator": "H200",
    "skypilot.infra": "aws",
    "skypilot.use_spot": "true",
    "skypilot.storage": "{/data: {name: bucket}}",
    "skypilot.volumes": "{/data: volume}",
}
# What an option needs beside it to have a meaning.
BESIDE = {
    "kubernetes.mount": ["launch.kubernetes.claim=work"],
    "kubernetes.device": ["train.device=cuda"],
    "skypilot.use_spot": ["launch.skypilot.storage={/c: {name: b}}", "checkpoint.folder=/c/run"],
}
# Read by the ranks or the job script from the job's copy of the config, or by launch itself; each has its own test.
BY_RANKS = {"slurm": {"cluster", "evict_share", "max_restarts", "retry_wait_s"}}
BY_LAUNCH = {
    "array_limit": "tests/launch/test_job_files.py::test_more_tasks_than_an_array_takes_are_several_arrays",
    "cluster": "tests/launch/test_check.py::test_a_model_that_cannot_fit_is_refused_with_the_figures"
}
# One value stands for the backend that has it.
FIXED = {("kubernetes.kind", "jobset"), ("kubernetes.kind", "trainjob")}


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rendered(on: Backend, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The whole of what would be started."""
    base = ["launch.devices_per_node=2", "launch.container=image", "launch.skypilot.accelerator=H100"]
    if on == "local":
        assert launch("run.yaml", overrides, None, dry_run=True) == 0
        return capsys.readouterr().out
    kind = [f"launch.kubernetes.kind={on}"] if on in ("jobset", "trainjob") else []
    made = job.make("run.yaml", [*base, *kind, *overrides])
    made = replace(made, folder=Path("/jobs/small-20260131-142501"), code=made.code and Path("/code"))
    render: Any = {"slurm": slurm.render, "skypilot": skypilot.render}.get(on, kubernetes.render)
    return str(render(made))


def test_every_option_is_in_the_table_and_has_a_value_here() -> None:
    sections = set(options.SECTIONS)
    assert set(LaunchConfig.model_fields) == set(USED) | sections
    assert set(VALUES) == set(options.options())


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("option", VALUES)
def test_used_changes_the_job_and_refused_is_refused(
    option: str, on: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, beside = f"launch.{option}={VALUES[option]}", BESIDE.get(option, [])
    run = load_run("run.yaml", [asked, *beside])
    if on not in options.used(option):
        if "." in option:
            options.check(load_run("run.yaml", [asked]), on)  # the section of another backend
            return
        with pytest.raises(UserError, match=rf"launch\.{option}=.*: .* does not use it; "):
            options.check(run, on)
        if on == "local":
            assert main(["launch", "run.yaml", asked, "--on", "local", "--dry-run"]) == 2
        return
    options.check(run, on)
    if option in BY_LAUNCH or option in BY_RANKS.get(on, ()) or (option, on) in FIXED:
        return
    assert rendered(on, beside, capsys) != rendered(on, [asked, *beside], capsys)


def test_what_the_ranks_read_reaches_them(small: Path) -> None:
    made = job.make(
        "run.yaml", ["launch.devices_per_node=2", "launch.evict_share=0.25", "launch.cluster=dgx-h100"]
    )
    job.write(made, "job.sbatch", "")
    assert load_run(made.folder / "runs/0.yaml").launch == made.first.launch


def test_a_default_that_is_written_out_is_no_request() -> None:
    options.check(load_run("run.yaml", ["launch.warn_s=180", "launch.evict_share=0.0"]), "local")


@pytest.mark.parametrize(
    ("overrides", "on", "says"),
    [
        (["launch.nodes=4"], "local", r"launch\.nodes=4: this machine does not use it; set launch\.nodes=1"),
        (["launch.max_restarts=1"], "local", "resilience.max_restarts is the one of --on local"),
        (["resilience.max_restarts=1"], "slurm", "launch.max_restarts is the one of a scheduler"),
        (["launch.mounts=[/a:/b]"], "trainjob", "launch.kubernetes.claim and .volumes mount storage"),
        (
            ["launch.preflight=false"],
            "skypilot",
            "launch.preflight=false: SkyPilot does not use it; leave it out",
        ),
        (["launch.env.A='**********'"], "slurm", "launch.env.A: its value is struck out in this file"),
        (["launch.setup=['export A_KEY=abc']"], "slurm", "the value of A_KEY would be written"),
        (["launch.sbatch=['--export=ALL,A_TOKEN=abc']"], "slurm", "the value of A_TOKEN would be written"),
    ],
)
def test_a_refusal_says_what_would_work(overrides: list[str], on: Backend, says: str) -> None:
    with pytest.raises(UserError, match=says):
        options.check(load_run("run.yaml", overrides), on)


@pytest.mark.parametrize(
    "setup",
    ["export A_KEY=$(cat key)", "export A_KEY=$OTHER", "TOKENIZERS_PARALLELISM=false", "export A_KEY="],
)
def test_a_setup_line_without_a_secret_is_none(setup: str) -> None:
    options.check(load_run("run.yaml", [f"launch.setup=['{setup}']"]), "slurm")


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs/launch.md").read_text()
    assert options.table() in page, "python -m trainsys.launch.options prints the table of docs/launch.md"


def test_local_runs_the_setup_in_the_environment_of_the_job(small: Path) -> None:
    """Once, before the ranks, by the Python of the virtual environment; the ranks have the variables."""
    (small / "venv/bin/python").unlink()
    (small / "venv/bin/python").write_text(
        f'#!/usr/bin/env bash\necho "by the venv, {"$GREETING"}, $1 $2 $3" >> ran\nexec {sys.executable} "$@"\n'
    )
    (small / "venv/bin/python").chmod(0o755)
    (small / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    text = f\"rank {os.environ['GREETING']} {os.environ['MADE']} \"\n"
        "    open('ran', 'a').write(text + '\\n')\n"
        "    if os.environ['RANK'] == '0':\n"
        "        open(os.environ['TRAINSYS_DONE_FILE'], 'w').write('{\"step\": 1}')\n"
        "    os._exit(0)\n"
    )
    command = [
        sys.executable, "-m", "trainsys", "launch", "run.yaml", "--on", "local", "--nproc", "2", "launch.venv=venv",
        "launch.env.GREETING=it is me", "launch.setup=['echo setup >> ran', 'export MADE=$GREETING!']",
    ]  # fmt: skip
    path = os.pathsep.join([str(small), os.environ.get("PYTHONPATH", str(ROOT))])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = (small / "ran").read_text().splitlines()
    assert lines[:2] == ["setup", "by the venv, it is me, -m trainsys launch"]
    ranks = [line for line in lines if line.startswith("rank")]
    assert len(ranks) == 2
    assert all(line.startswith("rank it is me it is me! ") for line in ranks)
    assert lines.count("setup") == 1


def test_a_setup_line_that_fails_ends_the_launch(small: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "trainsys",
        "launch",
        "run.yaml",
        "--on",
        "local",
        "launch.setup=['exit 9']",
    ]
    assert subprocess.run(command, capture_output=True, timeout=100).returncode == 9
