"""The back-test command on a made table and, where it is there, on the development table."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_runs_csv import ROW

from trainsys.errors import UserError
from trainsys.planner import backtest, calibrate
from trainsys.planner.calibrate import fit, row_weights, save, thin
from trainsys.planner.constants import DENSE, LOW, MOE, PRIORS, expected_error_pct, from_priors
from trainsys.planner.from_runs import build
from trainsys.planner.least_squares import levenberg
from trainsys.planner.memory_constants import memory_from_priors
from trainsys.planner.runs_csv import parse, read
from trainsys.planner.step_time import step_time

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/published_runs/runs.csv"


def _table(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({k for r in rows for k in r}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _sweep(slow: float = 1.0, source: str = "lab") -> list[dict[str, str]]:
    """Nine layouts whose measured times are the model's own times ``slow``."""
    degrees = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4)]
    rows = [
        {**ROW, "source": source, "tp": str(t), "pp": str(p), "dp": str(64 // t // p), "recompute": "full"}
        for t, p in degrees
    ]
    p = backtest.predict(parse(rows))
    return [{**r, "step_time_s": str(slow * s)} for r, s in zip(rows, p.seconds, strict=True)]


def test_perfect_predictions_score_perfectly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = backtest.run(_table(tmp_path / "t.csv", _sweep()), json=True)
    assert json.loads(capsys.readouterr().out) == data
    s = data["sources"]["lab"]
    assert s["used"] == 9
    assert s["refused"] == 0
    assert s["mape_pct"] == pytest.approx(0, abs=1e-6)
    assert s["spearman"] == pytest.approx(1)
    assert s["regret_max_pct"] == pytest.approx(0, abs=1e-6)
    assert s["first_pick_oom_pct"] == 0


def test_an_anchor_takes_out_a_common_factor_and_is_not_scored(tmp_path: Path) -> None:
    table = _table(tmp_path / "t.csv", _sweep(1.3))
    plain = backtest.run(table, "none", json=False)["overall"]
    with_one = backtest.run(table, "one", json=False)["overall"]
    assert plain["mape_pct"] == pytest.approx(100 * (1 - 1 / 1.3), rel=1e-6)
    left = 1.3 ** (1 - backtest.ANCHOR_TRUST)
    assert with_one["mape_pct"] == pytest.approx(100 * (1 - 1 / left), rel=1e-6)
    assert with_one["timed"] == plain["timed"] - 1


def test_refusals_are_counted_with_reasons_by_source(tmp_path: Path) -> None:
    rows = [*_sweep(), {**ROW, "source": "other", "gpu": "abacus"}, {**ROW, "source": "other", "tp": "3"}]
    data = backtest.run(_table(tmp_path / "t.csv", rows))
    other = data["sources"]["other"]
    assert other["refused"] == 2
    assert len(other["refused_reasons"]) == 2
    assert other["mape_pct"] is None
    assert data["overall"]["rows"] == 11


def test_bad_calls_are_user_errors(tmp_path: Path) -> None:
    table = _table(tmp_path / "t.csv", [{**ROW, "gpu": "abacus"}])
    with pytest.raises(UserError, match="none of 1 rows can be used"):
        backtest.run(table)
    with pytest.raises(UserError, match="none or one"):
        backtest.run(table, "two")


def test_fit_recovers_a_constant_and_stays_at_priors_without_data() -> None:
    rows = _sweep()
    cases, _, _ = build(parse(rows))
    assert cases is not None
    truth = from_priors()
    slow = type(truth)(**{n: (0.8 if n == "gemm_eff" else getattr(truth, n)) for n in PRIORS})
    measured = np.broadcast_to(step_time(cases, slow).total, (9,))
    found = fit(cases, measured, np.full(9, 1e4), only=["gemm_eff"])
    assert found.gemm_eff == pytest.approx(0.8, rel=0.01)
    unmoved = fit(cases, measured, np.zeros(9))
    assert asdict(unmoved) == pytest.approx(asdict(truth))


def test_a_site_that_is_slower_as_a_whole_is_not_held_against_the_constants() -> None:
    cases, _, _ = build(parse(_sweep()))
    assert cases is not None
    exact = np.broadcast_to(step_time(cases, from_priors()).total, (9,))
    measured, weights = 1.15 * exact, np.full(9, 10.0)
    here = fit(cases, measured, weights)
    elsewhere = fit(cases, measured, weights, sites=["lab"] * 9)
    moved = [float(np.median(step_time(cases, k).total / exact)) - 1.0 for k in (here, elsewhere)]
    assert moved[0] == pytest.approx(0.15, abs=0.02), "one machine: it is that slow"
    assert 0.0 < moved[1] < 0.6 * moved[0], "others' runs: it may have been they"


def test_levenberg_finds_a_minimum() -> None:
    x = levenberg(
        lambda v: np.array([v[0] - 3.0, 10.0 * (v[1] - v[0] ** 2)]), np.zeros(2), 0, steps=200, tol=1e-12
    )
    assert x == pytest.approx([3.0, 9.0], rel=1e-3)


def test_outliers_pull_no_harder_than_twice_the_noise() -> None:
    """Five numbers' middle: four at 0 pull it back by itself each, one far away by two."""
    far = np.array([0.0, 0.0, 0.0, 0.0, 100.0])
    for start in (0.0, 50.0, 300.0):
        (middle,) = levenberg(lambda v: v[0] - far, np.array([start]), 5, steps=800, tol=1e-12)
        assert middle == pytest.approx(0.5, abs=1e-3)
    (mean,) = levenberg(lambda v: v[0] - far, np.array([50.0]), 0, steps=800, tol=1e-12)
    assert mean == pytest.approx(20.0, abs=1e-3)


def test_a_step_from_far_away_does_not_land_on_the_other_side() -> None:
    (x,) = levenberg(lambda v: 1e3 * (v[0] - np.array([1.0, 1.01])), np.array([1.4]), 2)
    assert x == pytest.approx(1.005, abs=0.006)


def test_the_shipped_file_says_what_it_was_fitted_to_and_how_wrong_it_is(tmp_path: Path) -> None:
    runs = parse(_sweep())
    save(tmp_path / "c.yaml", runs, from_priors(), memory_from_priors(), {DENSE: 7.5})
    body = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert body["fitted_on"] == {"lab": 9}
    assert body["error_pct"] == {DENSE: 7.5}
    assert body["time"] == pytest.approx(asdict(from_priors()), rel=1e-3)
    for kind in (DENSE, LOW, MOE):
        assert 2.0 < (expected_error_pct(kind) or 0.0) < 30.0
    assert expected_error_pct("another kind") is None


def test_one_source_alone_is_calibrated_without_an_error_to_expect(tmp_path: Path) -> None:
    table, to = _table(tmp_path / "t.csv", _sweep()), tmp_path / "c.yaml"
    calibrate.main([str(table), str(to)])
    body = yaml.safe_load(to.read_text())
    assert body["fitted_on"] == {"lab": 9}
    assert body["error_pct"] == {}
    assert set(body["time"]) == set(PRIORS)


def test_large_sources_do_not_drown_small_ones() -> None:
    w = row_weights(["big"] * 1000 + ["small"] * 10)
    assert w[-1] == 1.0
    assert w[:1000].sum() < 60


def test_thinning_keeps_small_sources_whole_and_every_row_counted() -> None:
    sources = ["big"] * 1000 + ["small"] * 7
    index, stands = thin(np.arange(1007), sources, most=250)
    assert [i for i in index if i >= 1000] == list(range(1000, 1007))
    assert len(index) == 257
    assert stands.sum() == 1007


@pytest.mark.skipif(not SHARED.exists(), reason="the development table ../shared is not here")
def test_development_table_is_used_whole_and_predicted_well() -> None:
    data = backtest.report(backtest.predict(read(SHARED)), "none", ())
    total = data["overall"]
    assert total["used"] > 2800
    assert total["refused_layout_known"] < 0.02 * total["rows"]
    assert total["median_error_pct"] < 8
    assert total["spearman"] > 0.85
    assert total["oom_balanced_accuracy_pct"] > 90
