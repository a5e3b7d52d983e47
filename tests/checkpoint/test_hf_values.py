"""Each number of a ``config.json`` that is not its default arrives in the model, field by field.

The files are written here, by hand: a value that neither an import nor an export reads would survive a round trip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainsys.checkpoint.container import Entry, arrange, write_file
from trainsys.checkpoint.hf import import_, their_name
from trainsys.checkpoint.inspect import open_checkpoint
from trainsys.config.model import ModelConfig
from trainsys.models.decoder import Decoder
from trainsys.models.rope import inverse_frequencies

ROPE = {
    "rope_type": "llama3", "factor": 6.0, "low_freq_factor": 1.5, "high_freq_factor": 5.5,
    "original_max_position_embeddings": 48,
}  # fmt: skip
PLAIN = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "head_dim": 16,
    "num_key_value_heads": 1, "intermediate_size": 40, "vocab_size": 56, "max_position_embeddings": 288,
    "rms_norm_eps": 3e-4, "initializer_range": 0.035, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
WANT = {
    "n_layers": 3, "d_model": 24, "n_heads": 3, "head_dim": 16, "n_kv_heads": 1, "d_ff": 40, "vocab": 56,
    "max_seq_len": 288, "norm_eps": 3e-4, "init_std": 0.035, "tied_embeddings": True,
}  # fmt: skip
SPELLINGS: dict[str, dict[str, Any]] = {
    "rope_parameters": {"rope_parameters": {**ROPE, "rope_theta": 70_000.0}},
    "rope_scaling": {"rope_scaling": ROPE, "rope_theta": 70_000.0},
}


def imported(tmp_path: Path, config: dict[str, Any]) -> ModelConfig:
    """What an import makes of ``config`` and of weights that go with :data:`PLAIN`."""
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Decoder(ModelConfig.model_validate(WANT)).named_parameters()}
    head, placed = arrange([Entry(their_name(name), "F32", shape) for name, shape in shapes.items()], {"format": "pt"})
    write_file(source / "model.safetensors", head, [memoryview(bytes(e.nbytes)) for e in placed])
    manifest = open_checkpoint(import_(source, tmp_path / "run"))
    return ModelConfig.model_validate(manifest.config["model"])


@pytest.mark.parametrize("rope", SPELLINGS.values(), ids=SPELLINGS)
def test_every_value_arrives(tmp_path: Path, rope: dict[str, Any]) -> None:
    default = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_ff=8, vocab=8)
    cfg = imported(tmp_path, {**PLAIN, **rope})
    for name, value in WANT.items():
        assert getattr(cfg, name) == value, name
        assert value != getattr(default, name), f"{name}: a default shows nothing"
    want = {"scaling": "llama3", "theta": 70_000.0, "factor": 6.0, "low_freq_factor": 1.5, "high_freq_factor": 5.5,
            "original_seq_len": 48}  # fmt: skip
    for name, value in want.items():
        assert getattr(cfg.rope, name) == value, name
        assert value != getattr(default.rope, name), f"rope.{name}: a default shows nothing"


def test_the_factors_of_llama3_decide_the_frequencies(tmp_path: Path) -> None:
    """Against the formula of Llama 3.1's reference code, written out again with wavelengths."""
    cfg = imported(tmp_path, {**PLAIN, **SPELLINGS["rope_scaling"]})
    plain = [70_000.0 ** (-2 * i / 16) for i in range(8)]
    want = []
    for frequency in plain:
        length = 2 * torch.pi / frequency
        smooth = (48 / length - 1.5) / (5.5 - 1.5)
        if length < 48 / 5.5:
            want.append(frequency)
        elif length > 48 / 1.5:
            want.append(frequency / 6.0)
        else:
            want.append((1 - smooth) * frequency / 6.0 + smooth * frequency)
    assert any(a not in (f, f / 6.0) for a, f in zip(want, plain, strict=True)), "one lies between the two bounds"
    assert inverse_frequencies(cfg.rope, 16) == pytest.approx(want, rel=1e-12)
