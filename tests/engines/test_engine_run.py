"""A whole run under each other engine, as a user starts it: waterfall, W&B, going on in the native engine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainsys.profiler.explain import explain
from trainsys.telemetry.events import COMM

ENGINES = [
    pytest.param(
        name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"the {name} extra is not installed")
    )
    for name in ("deepspeed", "megatron")
]
ROOT = Path(__file__).resolve().parents[2]
RUN = """
name: run
model: {n_layers: 1, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 260}
parallel: {dp_shard: 2}
data: {source: synthetic}
optim: {lr: 2.0e-3}
train: {steps: 6, seq_len: 32, global_batch: 8, micro_batch: 2, device: cpu, dtype: fp32}
checkpoint: {every: 3, keep_last: 9}
telemetry: {out: runs, console: plain}
"""


def trainsys(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_", "LOCAL_"))}
    return subprocess.run(
        [sys.executable, "-m", "trainsys", *args],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=240,
        env={**env, "PYTHONPATH": str(ROOT), "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run_of(folder: Path) -> Path:
    (found,) = [p for p in (folder / "runs").glob("run-*") if not p.is_symlink()]
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_ranks(engine: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        RUN + f"engine: {engine}\n" + ("deepspeed: {zero_stage: 2}\n" if engine == "deepspeed" else "")
    )
    wandb = ["telemetry.wandb.mode=offline"] if importlib.util.find_spec("wandb") else []
    done = trainsys(tmp_path, "launch", "run.yaml", "--on", "local", "--nproc", "2", *wandb)
    assert done.returncode == 0, done.stdout + done.stderr
    noise = [line for line in done.stderr.splitlines() if engine in line.lower() or "Warning" in line]
    assert not noise, noise
    run = run_of(tmp_path)
    if engine == "deepspeed":
        settings = json.loads((run / "deepspeed.json").read_text())
        assert settings["zero_optimization"]["stage"] == 2
        assert settings["train_batch_size"] == 8
        assert settings["gradient_accumulation_steps"] == 2
        assert f"deepspeed: {json.dumps(settings)}" in done.stdout

    told = explain(run)
    assert told.waterfall is not None
    terms = {term.name for term in told.waterfall.terms}
    assert {"optimizer", COMM + "fsdp"} <= terms, terms
    assert COMM + "other" not in terms, "a group of ranks that is no axis"
    assert sum(t.seconds for t in told.waterfall.terms) == pytest.approx(told.waterfall.wall_s, rel=1e-9)

    if wandb:
        (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        exe = shutil.which("wandb", path=str(Path(sys.executable).parent)) or "wandb"
        seen = subprocess.run(
            [exe, "leet", "inspect", "--json", str(record)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for key in (
            "train/loss",
            "perf/step_time_s",
            "time/forward_s",
            "time/backward_s",
            "time/optimizer_s",
            "comm/fsdp_gb",
        ):
            assert key in seen, key

    # The second half again, natively, from the engine's own checkpoint.
    shutil.rmtree(tmp_path / "runs" / "checkpoints" / "run" / "step_0000000006")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    assert len(losses) == 6
    shutil.move(run, tmp_path / "first")
    again = trainsys(
        tmp_path, "train", "run.yaml", "engine=native", "parallel.dp_shard=1", "train.micro_batch=8"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    native = [json.loads(line) for line in (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [m["train/loss"] for m in native if "train/loss" in m] == pytest.approx(losses[3:], rel=1e-4)
