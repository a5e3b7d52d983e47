"""Logits equal those of Hugging Face's models with the same random weights: an implementation we did not write."""

from __future__ import annotations

import pytest
import torch

from trainsys.config.model import ModelConfig, RopeConfig
from trainsys.models.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

SHAPE = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "vocab": 101}
LLAMA3 = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_seq_len=32)
NAMES = (
    ("model.embed_tokens.", "embed."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
    ("model.layers.", "layers."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.", "attn."),
    ("mlp.", "ffn."),
    *((f"{letter}_proj", f"w{letter}") for letter in "qkvo"),
    *((f"{kind}_proj", f"w_{kind}") for kind in ("gate", "up", "down")),
)

CASES = {
    "llama": ("Llama", {}),
    "llama, many heads": ("Llama", {"n_kv_heads": None}),
    "llama, tied": ("Llama", {"tied_embeddings": True}),
    "llama, linear": ("Llama", {"rope": RopeConfig(scaling="linear", factor=4.0)}),
    "llama, llama3": ("Llama", {"rope": LLAMA3}),
    "llama, yarn": ("Llama", {"rope": RopeConfig(scaling="yarn", factor=4.0, original_seq_len=32)}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2, bias": ("Qwen2", {"qkv_bias": True}),
    "qwen3, qk norm": ("Qwen3", {"qk_norm": True, "head_dim": 32, "tied_embeddings": True}),
}


def theirs(family: str, cfg: ModelConfig):
    rope = {
        "rope_type": "default" if cfg.rope.scaling == "none" else cfg.rope.scaling,
        "rope_theta": cfg.rope.theta,
    }
    if cfg.rope.scaling != "none":
        rope |= {"factor": cfg.rope.factor, "original_max_position_embeddings": cfg.rope.original_seq_len}
    if cfg.rope.scaling == "llama3":
        rope |= {"low_freq_factor": cfg.rope.low_freq_factor, "high_freq_factor": cfg.rope.high_freq_factor}
    options = {} if cfg.sliding_window is None else {"sliding_window": cfg.sliding_window}
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=cfg.n_layers,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.dim_per_head,
        intermediate_size=cfg.d_ff,
        vocab_size=cfg.vocab,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied_embeddings,
        max_position_embeddings=128,
        initializer_range=0.2,
        rope_parameters=rope,
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def renamed(state: dict[str, torch.Tensor], cfg: ModelConfig) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        for old, new in NAMES:
            name = name.replace(old, new)
        out[name] = tensor
    if cfg.tied_embeddings:
        out.pop("head.weight", None)
    return out


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_same_weights_same_logits(family, options):
    cfg = ModelConfig(**(SHAPE | options))
    their_model, model = theirs(family, cfg), Decoder(cfg)
    with torch.no_grad():
        for param in their_model.parameters():
            if param.dim() == 1:  # their norms start at 1 and their biases at 0
                param.add_(torch.randn(param.shape) * 0.2)
        model.load_state_dict(renamed(their_model.state_dict(), cfg))
        tokens = torch.randint(cfg.vocab, (2, 100))
        positions = torch.arange(100).expand(2, 100)
        logits, want = model(tokens, positions), their_model(tokens, position_ids=positions).logits
    assert want.std() > 0.1
    assert ((logits - want).abs() / want.std()).max() < 1e-5
