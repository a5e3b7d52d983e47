"""The meter is the formulas, only faster."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.loader import load_run
from trainsys.flops import StepWork, step_flops
from trainsys.telemetry.flops_meter import FlopsMeter

DEMO = str(Path(__file__).resolve().parents[2] / "configs/train/demo.yaml")
NAMES = ("none", "full", "selective", "every_n")
METERS = []
for name in NAMES:
    cfg = load_run(DEMO, (f"recompute.policy={name}",))
    METERS.append((cfg, FlopsMeter(cfg.model, 512, cfg.recompute)))


@settings(max_examples=40)
@given(
    st.sampled_from(range(len(NAMES))), st.integers(0, 1 << 24), st.integers(0, 1 << 40), st.integers(0, 1 << 20)
)
def test_the_meter_agrees_with_the_formulas(which: int, tokens: int, pairs: int, padding: int) -> None:
    cfg, meter = METERS[which]
    told = meter(tokens, pairs, tokens + padding)
    work = StepWork(tokens=tokens, attn_pairs=pairs, seq_len=512, computed_tokens=tokens + padding)
    expected = step_flops(cfg.model, work, cfg.recompute)
    assert told.model == pytest.approx(expected.model, rel=1e-12)
    assert told.palm == pytest.approx(expected.palm, rel=1e-12)
    assert told.hardware == pytest.approx(expected.hardware, rel=1e-12)
