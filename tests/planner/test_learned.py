"""What runs of one machine teach the planner, its file, and the JSON of a bench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support_cases import case

from trainsys.errors import UserError
from trainsys.planner import learned
from trainsys.planner.constants import shipped
from trainsys.planner.step_time import step_time

RUNS = case(
    tp=[1.0, 2.0, 4.0, 8.0, 1.0, 2.0],
    dp=[64.0, 32.0, 16.0, 8.0, 64.0, 32.0],
    micro_batch=[1.0, 1.0, 2.0, 4.0, 2.0, 4.0],
    fsdp_shard=[64.0, 32.0, 16.0, 8.0, 64.0, 32.0],
)
HERE = replace(shipped(), gemm_eff=0.75 * shipped().gemm_eff, link_eff=0.6 * shipped().link_eff)


def seconds() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.broadcast_to(step_time(RUNS, HERE).total, (6,))


def test_a_few_runs_teach_what_differs_here() -> None:
    found = learned.learn(RUNS, seconds())
    assert found.runs == 6
    assert found.before_pct is not None
    assert found.before_pct > 10
    assert found.error_pct is not None
    assert found.error_pct < 0.3 * found.before_pct, "each predicted from the five others"
    assert "fitted to 6 runs measured here" in found.confidence


def test_one_run_teaches_a_factor() -> None:
    found = learned.learn(RUNS.take(slice(0, 1)), 1.3 * np.broadcast_to(step_time(RUNS, shipped()).total, (6,))[:1])
    assert found.scale == pytest.approx(1.3)
    assert found.constants == shipped()
    assert "anchored on one run" in found.confidence


def test_its_file_is_read_back_and_another_versions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    found = learned.learn(RUNS, seconds(), {"gemm_16": 5e14})
    learned.save(path, found)
    assert learned.load(path) == found
    older = json.loads(path.read_text())
    older["constants"]["host_modern"] = older["constants"].pop("layer_host_modern_s")
    path.write_text(json.dumps(older))
    with pytest.raises(UserError, match="not this version's; `trainsys sweep --calibration` writes it anew"):
        learned.load(path)


def test_a_benchs_rates_are_taken_for_one_device(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = [
        {"key": {"dtype": "bf16", "processes": 2}, "flops_per_s": 1e15},
        {"key": {"processes": 2}, "bytes_per_s": 4e12},
    ]
    path.write_text(json.dumps(rows))
    assert learned.load(path).rates == {"gemm_16": 5e14, "peak_16": 5e14, "hbm_bw": 2e12}
    path.write_text("[]")
    with pytest.raises(UserError, match="neither what trainsys sweep"):
        learned.load(path)
