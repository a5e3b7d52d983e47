"""What a pod starts: torchrun's agent by PET_* variables, and an exit code that Kubernetes understands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from trainsys.launch.node import EXIT_DRAINED
from trainsys.launch.node import MARKER as READ
from trainsys.resilience.drain import MARKER

RUN = """
name: tiny
model: {n_layers: 1, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 100000, seq_len: 32, global_batch: 2, micro_batch: 2, device: cpu, dtype: fp32, threads: 1}
data: {source: synthetic}
telemetry: {console: plain}
"""


def start(folder: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainsys.launch.node"],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_without_a_config_it_is_one_line(tmp_path: Path) -> None:
    with start(tmp_path) as node:
        said, _ = node.communicate(timeout=100)
    assert node.returncode == 2
    assert said.startswith("trainsys: error: TRAINSYS_RUN is not set")


def test_a_pod_that_is_told_to_end_saves_and_asks_to_be_started_again(tmp_path: Path) -> None:
    assert READ == MARKER
    with start(tmp_path, TRAINSYS_RUN=RUN) as node:
        assert node.stdout is not None
        said = []
        for line in node.stdout:
            said.append(line)
            if line.startswith("step "):
                node.send_signal(signal.SIGTERM)
                break
        said += node.stdout.readlines()
        node.wait(200)
    assert node.returncode == EXIT_DRAINED, "".join(said)
    note = json.loads((tmp_path / "runs/checkpoints/tiny" / MARKER).read_text())
    assert note["signal"] == "SIGTERM"
    assert note["saved_step"] > 0
