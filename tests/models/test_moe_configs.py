"""The mixtures that come with trainsys are the published ones."""

from __future__ import annotations

import pytest

from trainsys.config.loader import load_run
from trainsys.config.root import config_root
from trainsys.flops import param_counts

# Totals as published on the model cards (safetensors); active: "12.9B", "39B", "3.3B", "22B" there.
PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, 12.9e9),
    "mixtral-8x22b": (140_620_634_112, 39e9),
    "qwen3-30b-a3b": (30_532_122_624, 3.3e9),
    "qwen3-235b-a22b": (235_093_634_560, 22e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    total, active = PUBLISHED[name]
    counts = param_counts(load_run(f"models/{name}").model)
    assert counts.total == total
    assert counts.active == pytest.approx(active, rel=0.02)
    text = (config_root() / "models" / f"{name}.yaml").read_text()
    assert f"Parameters: {counts.total:,}, active {counts.active:,}." in text


def test_deepseek_style_experts_are_deepseek_s() -> None:
    """Table of the report: 671B in all, of which experts; attention is another here, experts are not."""
    model = load_run("models/deepseek-v3-style").model
    assert model.moe is not None
    counts = param_counts(model)
    assert counts.experts == 58 * 256 * 3 * 7168 * 2048
    assert counts.shared_experts == 58 * 3 * 7168 * 2048
    assert (model.moe.score, model.moe.balance, model.moe.route_scale) == ("sigmoid", "bias", 2.5)


def test_tiny_moe_is_tiny() -> None:
    assert param_counts(load_run("models/tiny-moe").model).total < 10**7
