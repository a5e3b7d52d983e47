"""What launch finds on the submitting machine: files that are missing, models that do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainsys.cli import main
from trainsys.config.loader import load_run
from trainsys.errors import UserError
from trainsys.flops import param_counts
from trainsys.hardware import lookup
from trainsys.launch import check
from trainsys.planner.cluster import load_cluster
from trainsys.planner.one import predict_run

RUN = """
name: small
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 1, seq_len: 32, global_batch: 16, device: cpu}
data: {source: synthetic}
launch: {devices_per_node: 2}
"""
BIG = ["train.global_batch=64", "launch.cluster=dgx-h100", "parallel.dp_shard=-1"]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        (["data.source=text", "data.path=corpus.txt"], "data.path=corpus.txt"),
        (["data.source=jsonl", "data.path=data/*.jsonl"], "data.path=data/*.jsonl"),
        (["data.source=shards", "data.path=shards"], "data.path=shards"),
        (["data.source=megatron", "data.path=some/prefix"], "data.path=some/prefix.idx"),
        (["data.tokenizer=tokenizer.json"], "data.tokenizer=tokenizer.json"),
        (["checkpoint.resume=runs/old/step-5"], "checkpoint.resume=runs/old/step-5"),
    ],
)
def test_a_path_that_is_not_there_is_refused_and_then_accepted(
    small: Path, overrides: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["launch", "run.yaml", "--on", "slurm", "--dry-run", *overrides]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.err == f"trainsys: error: {missing}: no such file or folder\n"
    assert said.out == ""
    path = small / missing.partition("=")[2].replace("*", "part-0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert main(command) == 0
    assert capsys.readouterr().err == ""


def test_a_path_on_another_disk_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_device", lambda text: 1 if text.startswith("/scratch") else 2)
    run = load_run("run.yaml", ["data.source=text", "data.path=/scratch/corpus.txt"])
    check.check_paths(run)
    assert capsys.readouterr().err == (
        "trainsys: warning: data.path=/scratch/corpus.txt: not on this machine; every node must have it\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--on", "kubernetes", "launch.container=image", "launch.kubernetes.claim=work"],
        ["--on", "skypilot", "launch.skypilot.accelerator=H100"],
        ["--on", "slurm", "launch.container=image"],
    ],
)
def test_paths_of_images_and_of_rented_machines_are_not_judged(arguments: list[str]) -> None:
    data = ["data.source=text", "data.path=/data/in/the/image.txt"]
    assert main(["launch", "run.yaml", "--dry-run", *data, *arguments]) == 0


def test_local_checks_paths_too(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data.source=text", "data.path=corpus.txt"]
    assert main(["launch", "run.yaml", "--on", "local", "--dry-run", *data]) == 2
    assert capsys.readouterr().err.startswith("trainsys: error: data.path=corpus.txt")


def test_a_model_that_cannot_fit_is_refused_with_the_figures() -> None:
    big = load_run("train/llama3-405b", [*BIG, "parallel.tp=1", "parallel.pp=1"])
    with pytest.raises(UserError) as refused:
        check.check_memory(big, 8)
    said = re.fullmatch(
        r"llama3-405b on 8 x H100-SXM-80 with this layout: weights, gradients and optimizer states alone take "
        r"([\d.]+) GiB a device of ([\d.]+); `trainsys plan RUN\.yaml --cluster NAME --gpus 8` lists layouts that fit",
        str(refused.value),
    )
    assert said is not None
    # AdamW's 16 bytes a parameter over 8 devices are the least that any sharding leaves.
    assert float(said.group(1)) > 16 * param_counts(big.model).total / 8 / 2**30
    assert float(said.group(2)) == pytest.approx(lookup("H100-SXM-80").memory.usable_gib, abs=0.1)


@pytest.mark.parametrize(
    "named",
    [{"overrides": ["hardware=H100-SXM-80"]}, {"overrides": [], "accelerator": "H100"}],
    ids=["hardware", "skypilot"],
)
def test_the_device_may_be_named_in_other_ways(named: dict[str, Any]) -> None:
    run = load_run(
        "train/llama3-70b", ["parallel.tp=1", "parallel.pp=1", "parallel.dp_shard=1", *named["overrides"]]
    )
    with pytest.raises(UserError, match="states alone take"):
        check.check_memory(run, 1, named.get("accelerator"))


def test_a_peak_above_the_device_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """The states fit; what is predicted with activations does not, so it is a guess, and says so."""
    settings = [*BIG, "parallel.tp=1", "train.micro_batch=8", "recompute.policy=none", "train.compile=false"]
    run = load_run("train/llama3-8b", settings)
    predicted = predict_run(run, 8, load_cluster("dgx-h100").machine())
    assert predicted.memory_bytes > lookup("H100-SXM-80").memory.usable_gib * 2**30
    check.check_memory(run, 8)
    said = capsys.readouterr().err
    assert said.startswith("trainsys: warning: llama3-8b on 8 x ")
    assert f"{predicted.memory_bytes / 2**30:.1f} GiB a device are predicted at the peak" in said


def test_a_run_that_fits_and_a_device_that_nobody_knows_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check.check_memory(load_run("train/llama3-8b", [*BIG, "parallel.tp=8", "recompute.policy=full"]), 64)
    check.check_memory(load_run("train/llama3-405b", ["parallel.tp=1"]), 8, "SomeNewDevice")
    check.check_memory(load_run("train/llama3-405b", ["parallel.tp=1"]), 8)
    check.check_memory(load_run("run.yaml", ["launch.cluster=dgx-h100"]), 8)
    assert capsys.readouterr().err == ""


def test_a_cluster_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="nowhere"):
        check.check_memory(load_run("train/llama3-8b", ["launch.cluster=nowhere"]), 8)


def test_launch_asks_and_stays_quick() -> None:
    """One process: refused before anything is written, without torch."""
    code = (
        "import sys\nfrom trainsys.cli import main\n"
        "code = main(['launch', 'train/llama3-405b', '--on', 'slurm', '--dry-run', 'launch.cluster=dgx-h100',\n"
        "  'launch.nodes=1', 'parallel.tp=1', 'parallel.pp=1', 'data.source=synthetic', 'data.path=null',\n"
        "  'parallel.dp_shard=-1', 'resilience.elastic=false'])\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "states alone take" in done.stderr


@pytest.mark.parametrize(
    ("folder", "mounts", "working", "on_one"),
    [
        ("/ckpt/run", ["/ckpt"], None, True),
        ("/ckpt", ["/ckpt"], None, True),
        ("/ckpts/run", ["/ckpt"], None, False),
        ("runs/x", ["/shared"], "/shared", True),
        ("runs/x", ["/shared"], None, False),
        ("/tmp/x", ["/shared"], "/shared", False),
        ("~/ckpt/run", ["/home/me/ckpt"], None, False),
        ("/ckpt/../tmp", ["/ckpt"], None, False),
    ],
)
def test_mounted(folder: str, mounts: list[str], working: str | None, on_one: bool) -> None:
    assert check.mounted(folder, mounts, working) == on_one
