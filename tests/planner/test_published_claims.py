"""A published row that says only its MFU or FLOP/s is compared with, by the convention it tells."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from trainsys.planner.backtest import predict, report
from trainsys.planner.from_runs import build
from trainsys.planner.measured import measured_seconds
from trainsys.planner.runs_csv import parse, read

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/published_runs/runs.csv"
GPT3 = {
    "source": "me", "model_name": "gpt3", "n_layers": "96", "d_model": "12288", "n_heads": "96", "d_ff": "49152",
    "ffn_kind": "gelu", "vocab": "51200", "seq_len": "2048", "gpu": "A100-80", "n_gpus": "512", "gpus_per_node": "8",
    "dtype": "bf16", "dp": "8", "tp": "8", "pp": "8", "sp": "True", "micro_batch": "1", "global_batch": "768",
    "recompute": "selective", "oom": "False",
}  # fmt: skip
# Korthikanti et al. 2022, appendix A: FLOPs of a step.
STEP_FLOPS = 72 * 768 * 2048 * 96 * 12288**2 * (1 + 2048 / (6 * 12288) + 51200 / (12 * 12288 * 96))


def seconds(**says: str) -> float:
    cases, kept, refused = build(parse([{**GPT3, **says}]))
    assert cases is not None, refused
    (found,) = measured_seconds(cases, kept)
    return float(found)


def test_mfu_and_flops_are_those_of_the_publication() -> None:
    want = STEP_FLOPS / (512 * 0.5 * 312e12)
    assert seconds(mfu="0.5") == pytest.approx(want, rel=1e-6)
    assert seconds(mfu="50%") == pytest.approx(want, rel=1e-6)
    assert seconds(tflops_per_gpu="156") == pytest.approx(want, rel=1e-6)
    assert seconds(mfu="0.25", peak_tflops_dense_used="624") == pytest.approx(want, rel=1e-6)


def test_what_is_measured_comes_before_what_is_claimed() -> None:
    assert seconds(mfu="0.5", step_time_s="7") == 7.0


def test_causal_flops_are_fewer() -> None:
    attention = 12 * 96 * 12288 * 2048 * (768 * 2048)
    want = (STEP_FLOPS - attention / 2) / (512 * 156e12)
    assert seconds(tflops_per_gpu="156", mfu_formula_notes="causal attention") == pytest.approx(want, rel=1e-6)
    noncausal = seconds(tflops_per_gpu="156", mfu_formula_notes="non causal, logits counted")
    assert noncausal == pytest.approx(STEP_FLOPS / (512 * 156e12), rel=1e-6)


@pytest.mark.parametrize("says", [
    {},
    {"mfu": "0.5", "oom": "True"},
    {"mfu": "0.5", "dtype": "fp8", "gpu": "H100-SXM"},  # over which peak?
    {"tflops_per_gpu": "208", "mfu_formula_notes": "4 passes, i.e. HFU"},
])  # fmt: skip
def test_nothing_usable_is_no_time(says: dict[str, str]) -> None:
    assert math.isnan(seconds(**says))


def test_backtest_scores_a_claim_and_counts_what_is_timed() -> None:
    runs = parse([{**GPT3, "mfu": "0.5"}, GPT3])
    scores = report(predict(runs), "none", [])["sources"]["me"]
    assert (scores["used"], scores["timed"]) == (2, 1)
    assert 0 < scores["mape_pct"] < 100


@pytest.mark.skipif(not SHARED.exists(), reason="the development table ../shared is not here")
def test_claims_agree_with_the_times_beside_them() -> None:
    """Rows that print both: each source's own arithmetic comes out."""
    runs = read(SHARED)
    cases, kept, _ = build(runs)
    assert cases is not None
    timeless = [
        dataclasses.replace(
            r,
            num={**r.num, **dict.fromkeys(("step_time_s", "tokens_per_s_per_gpu", "mfu_recomputed_causal"), math.nan)},
        )
        for r in kept
    ]
    ratio = measured_seconds(cases, timeless) / np.asarray([r.step_s for r in kept])
    for source, rows in (("nemo", 17), ("korthikanti22", 5), ("moe-parallel-folding", 18), ("megatron-bridge", 121)):
        own = ratio[[r.source == source for r in kept]]
        assert np.isfinite(own).sum() == rows
        assert np.nanmedian(own) == pytest.approx(1.0, abs=2e-3)
