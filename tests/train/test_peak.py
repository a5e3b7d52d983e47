"""A ceiling that was measured on a busy machine is raised by the run that goes beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainsys.hardware.measured import Measurement, MeasurementKey, load_measurement, store_measurement
from trainsys.train.peak import raise_peak
from trainsys.train.process import Process


def test_what_a_run_reaches_is_the_ceiling_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path))
    proc = Process(0, 2, 0, 2, torch.device("cpu"))
    key = MeasurementKey.here("fp32", 2, torch.get_num_threads())
    assert not raise_peak("fp32", proc, 9e9)  # nothing was measured, so there is nothing to raise
    store_measurement(Measurement(key=key, flops_per_s=5e9, shape=(1, 1, 1), seconds=1.0))
    assert not raise_peak("fp32", proc, 4e9)
    assert not raise_peak("fp32", Process(1, 2, 1, 2, torch.device("cpu")), 9e9)
    assert not raise_peak("fp32", Process(0, 4, 0, 2, torch.device("cpu")), 9e9)
    assert raise_peak("fp32", proc, 9e9)
    known = load_measurement(key)
    assert known is not None
    assert known.flops_per_s == 9e9
