"""Hugging Face folders in and out: what `transformers` computes from them is what we compute, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.convert import diff
from trainsys.checkpoint.hf import export, from_hf_config, import_, our_name, their_name, to_hf_config
from trainsys.checkpoint.inspect import open_checkpoint
from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.models.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

TINY = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3, tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_import_gives_their_logits_and_export_gives_them_back(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY, **options, attn_implementation="eager")
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:  # norms start at 1 and biases at 0
                p.add_(torch.randn(p.shape) * 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    checkpoint = import_(tmp_path / "hf", tmp_path / "run")

    manifest = open_checkpoint(checkpoint)
    cfg = ModelConfig.model_validate(manifest.config["model"])
    model, reader = Decoder(cfg), AtomReader(checkpoint, manifest)
    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(reader.read(name))
        logits, want = model(tokens, torch.arange(40).expand(2, 40)), theirs(tokens).logits
    assert want.std() > 0.1
    assert ((logits - want).abs() / want.std()).max() < 1e-5

    export(checkpoint, tmp_path / "out", "F32", shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    for name, p in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    with torch.no_grad():
        assert ((again(tokens).logits - want).abs() / want.std()).max() < 1e-5
    assert diff(import_(tmp_path / "out", tmp_path / "run2"), checkpoint) == []
    export(checkpoint, tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    name, p = next(iter(theirs.state_dict().items()))
    assert torch.equal(half.state_dict()[name].float(), p.bfloat16().float())


def test_names_are_translated_both_ways() -> None:
    cfg = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab=8, qk_norm=True)
    with torch.device("meta"):
        names = [name for name, _ in Decoder(cfg).named_parameters()]
    assert [our_name(their_name(name)) for name in names] == names
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.scale: no counterpart"):
        our_name("model.layers.0.scale")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ],
)
def test_what_the_model_cannot_express_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_hf_config({"model_type": "llama", **TINY, **change})


def test_configs_come_back(tmp_path: Path) -> None:
    cfg = ModelConfig(
        name="llama",
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=48,
        vocab=64,
        norm_eps=1e-6,
    )
    assert from_hf_config(json.loads(json.dumps(to_hf_config(cfg)))) == cfg
    gelu = cfg.model_copy(update={"ffn_kind": "gelu"})
    with pytest.raises(UserError, match="ffn_kind=gelu"):
        to_hf_config(gelu)
