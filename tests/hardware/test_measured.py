"""The store of measured ceilings, and the peak that a run divides by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainsys.hardware import (
    Measurement,
    MeasurementKey,
    load_measurement,
    lookup,
    peak_for_run,
    store_measurement,
)
from trainsys.hardware.machine import usable_cores
from trainsys.hardware.measured import cache_path, cpu_model

KEY = MeasurementKey(device="Some CPU", cores=2, torch="2.13.0", dtype="bf16", processes=4, threads=1)


def measured(flops_per_s: float = 8e10, **changes: Any) -> Measurement:
    key = KEY.model_copy(update=changes)
    return Measurement(key=key, flops_per_s=flops_per_s, shape=(256, 256, 256), seconds=0.5)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ceilings.json"
    assert load_measurement(KEY, path) is None
    store_measurement(measured(), path)
    store_measurement(measured(9e9, dtype="fp32"), path)
    assert load_measurement(KEY, path) == measured()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "other",
    [{"device": "B"}, {"cores": 4}, {"torch": "2.11.0"}, {"dtype": "fp32"}, {"processes": 2}, {"threads": 2}],
    ids=lambda o: next(iter(o)),
)
def test_another_condition_is_another_ceiling(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "ceilings.json"
    store_measurement(measured(), path)
    key = KEY.model_copy(update=other)
    assert load_measurement(key, path) is None
    store_measurement(measured(1e10, **other), path)
    assert load_measurement(key, path) == measured(1e10, **other)
    assert load_measurement(KEY, path) == measured()


def test_a_slower_repeat_does_not_lower_a_ceiling(tmp_path: Path) -> None:
    path = tmp_path / "ceilings.json"
    for rate, kept in ((5e10, 5e10), (3e10, 5e10), (6e10, 6e10)):
        store_measurement(measured(rate), path)
        found = load_measurement(KEY, path)
        assert found is not None
        assert found.flops_per_s == kept


@pytest.mark.parametrize("content", ["", "{", "[]", '{"%s": {"flops_per_s": -1}}', '{"%s": 3}'])
def test_a_damaged_store_is_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ceilings.json"
    path.write_text(content.replace("%s", KEY.text))
    assert load_measurement(KEY, path) is None
    store_measurement(measured(), path)
    assert load_measurement(KEY, path) == measured()


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TRAINSYS_CACHE", raising=False)
    assert cache_path() == tmp_path / "xdg" / "trainsys" / "ceilings.json"
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path / "own"))
    assert cache_path() == tmp_path / "own" / "ceilings.json"


def test_the_key_of_this_machine() -> None:
    key = MeasurementKey.here("bf16", 2, 1)
    assert key.device == cpu_model() != ""
    assert key.cores == usable_cores() >= 1
    assert MeasurementKey.here("bf16", 2, 1, "NVIDIA X").device == "NVIDIA X"


def test_peak_says_what_it_is() -> None:
    catalogue = peak_for_run(lookup("H100-SXM-80"), "bf16", measured())
    assert catalogue is not None
    assert (catalogue.flops_per_s, catalogue.source) == (989.4e12, "catalogue")
    assert catalogue.label == "H100-SXM-80 bf16 dense 989.4 TFLOP/s"
    here = peak_for_run(None, "bf16", measured())
    assert here is not None
    assert here.flops_per_s == 2e10  # a rank's share of four
    assert here.label == "measured here (matmul bf16 4 procs x 1 thread)"
    assert here.source == "measured"


def test_no_peak_is_guessed() -> None:
    assert peak_for_run(None, "bf16") is None
    assert peak_for_run(lookup("V100-SXM2-16"), "bf16") is None
    own = peak_for_run(lookup("V100-SXM2-16"), "bf16", measured())
    assert own is not None
    assert own.source == "measured"
