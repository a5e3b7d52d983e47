"""Rotary embedding: rotation by complex numbers, relative positions, and what each scaling does to a frequency."""

from __future__ import annotations

import math

import pytest
import torch

from trainsys.config.model import RopeConfig
from trainsys.models.rope import apply_rope, inverse_frequencies, rope_tables

SCALINGS = {
    "none": RopeConfig(),
    "linear": RopeConfig(scaling="linear", factor=4.0),
    "llama3": RopeConfig(scaling="llama3", theta=5e5, factor=8.0, original_seq_len=64),
    "yarn": RopeConfig(scaling="yarn", factor=4.0, original_seq_len=64),
}


@pytest.mark.parametrize("rope", SCALINGS.values(), ids=SCALINGS)
def test_rotates_each_pair_by_position_times_frequency(rope):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 100, 3, 3]])
    got = apply_rope(x, *rope_tables(rope, 8, positions, torch.float64))
    freqs = torch.tensor(inverse_frequencies(rope, 8), dtype=torch.float64)
    turn = torch.exp(1j * positions[..., None] * freqs)[:, :, None] * rope.temperature
    pairs = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(got, torch.cat((pairs.real, pairs.imag), -1))


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        rotated = [
            apply_rope(x, *rope_tables(RopeConfig(), 16, torch.tensor([[at]]), torch.float64))
            for x, at in ((q, i), (k, j))
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(1004, 1000), rel=1e-9)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)


def test_bf16_is_rotated_in_fp32():
    x = torch.randn(1, 300, 2, 64).bfloat16()
    tables = rope_tables(RopeConfig(), 64, torch.arange(300).unsqueeze(0), torch.float32)
    got, want = apply_rope(x, *tables), apply_rope(x.float(), *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


def test_linear_divides_every_frequency():
    plain = inverse_frequencies(RopeConfig(), 16)
    assert plain[0] == 1.0
    assert plain[-1] == pytest.approx(10_000 ** (-14 / 16))
    assert inverse_frequencies(SCALINGS["linear"], 16) == tuple(f / 4 for f in plain)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_frequencies_are_kept_and_slow_ones_divided(kind):
    rope = SCALINGS[kind].model_copy(update={"original_seq_len": 8192})
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), 128)
    scaled = inverse_frequencies(rope, 128)
    kept, divided = (4.0, 1.0) if kind == "llama3" else (32.0, 1.0)
    between = 0
    for i, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        # YaRN rounds the ends of its ramp outwards to whole indices: one index either side may be mixed.
        near = [
            plain[min(max(i + d, 0), 63)] * 8192 / (2 * math.pi)
            for d in ((-1, 0, 1) if kind == "yarn" else (0,))
        ]
        if min(near) > kept:
            assert after == pytest.approx(before, rel=1e-12)
        elif max(near) < divided:
            assert after == pytest.approx(before / rope.factor, rel=1e-12)
        else:
            between += 1
            assert before / rope.factor <= after <= before
    assert 2 < between < 40
    assert list(scaled) == sorted(scaled, reverse=True)


def test_yarn_sharpens_attention_by_its_temperature():
    assert SCALINGS["yarn"].temperature == pytest.approx(0.1 * math.log(4) + 1)
    assert [SCALINGS[k].temperature for k in ("none", "linear", "llama3")] == [1.0, 1.0, 1.0]
