"""A short form of profiling/cluster_faults.py: a few faults on a real Slurm, each run to its end and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.slurm import needs_slurm

STUDY = Path(__file__).resolve().parents[2] / "profiling/cluster_faults.py"
pytestmark = needs_slurm


def test_a_few_faults_and_nothing_is_lost(tmp_path: Path) -> None:
    faults = ["array with a failing task", "kill -9 a rank", "node with a broken device", "scancel"]
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(STUDY), "--n", str(len(faults)), "--faults", *faults, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["right"] == found["faults"] == len(faults)
    assert found["false_completed"] == 0
    assert found["most_steps_lost"] <= found["save_interval"]
    assert found["steps_compared_to_the_bit"] >= 80 * len(faults)


def test_a_full_disk_fails_an_attempt_and_not_the_job(tmp_path: Path) -> None:
    """Needs to mount a small file system."""
    probe = tmp_path / "probe"
    probe.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(probe)], capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs, and this user may not mount one")
    subprocess.run(["umount", str(probe)], check=True)
    out = tmp_path / "faults.json"
    command = [sys.executable, str(STUDY), "--n", "1", "--faults", "full disk", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
