"""The planner's peak memory of the native engine is within 3% of what dry runs of its step count, 6% for mixtures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainsys.config.loader import load_run
from trainsys.planner.cluster import load_cluster
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.one import case_of

# Written by profiling/dryrun_memory.py.
FOUND = json.loads(
    (Path(__file__).resolve().parents[2] / "profiling/results/dryrun_memory.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", FOUND["cases"], ids=lambda c: c["name"])
def test_near_the_dry_run(case: dict[str, Any]) -> None:
    cfg = load_run(FOUND["run"], case["overrides"])
    # What the dry run does not see: CUDA's context, workspaces, NCCL's buffers.
    constants = replace(shipped_memory(), overhead_bytes=0.0)
    memory = peak_memory(case_of(cfg, case["world"], load_cluster("dgx-h100").machine()), constants)
    total = float(np.ravel(memory.total)[0])
    assert total == pytest.approx(max(case["peak_bytes"].values()), rel=0.06 if "moe" in case["name"] else 0.03)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    assert total == pytest.approx(sum(float(np.ravel(getattr(memory, p))[0]) for p in parts))
