"""``config.json`` of the Llama, Mistral, Qwen2 and Qwen3 families to a model config and back. No torch here.

What a file leaves out is what ``transformers`` takes for it; what changes the computation and is not understood is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trainsys.config.model import ModelConfig, RopeConfig
from trainsys.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What ``transformers`` takes where a family's file has no such key."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""Keys that change the computation, with the values that our models compute; null is as good as absent."""
_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "_name_or_path",
}  # fmt: skip
_HARMLESS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp", "tokenizer_class",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "is_decoder", "torchscript",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
    "chunk_size_feed_forward", "unsloth_fixed", "unsloth_version", "cross_attention_hidden_size", "prefix",
    # Of generation, not of the model.
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "max_length", "min_length", "max_new_tokens",
    "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "begin_suppress_tokens", "suppress_tokens", "early_stopping", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "remove_invalid_values", "output_scores", "return_dict_in_generate",
}  # fmt: skip
_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def family_of(cfg: ModelConfig) -> str:
    """Which family holds such a model; UserError: none."""
    no = [
        f"{name}={value}"
        for name, value, plain in (
            ("ffn_kind", cfg.ffn_kind, "swiglu"), ("norm", cfg.norm, "rmsnorm"),
            ("parallel_block", cfg.parallel_block, False), ("moe", cfg.moe, None),
        )
        if value != plain
    ]  # fmt: skip
    if cfg.qk_norm and cfg.qkv_bias:
        no.append("qk_norm with qkv_bias")
    if cfg.sliding_window is not None and (cfg.qk_norm or cfg.qkv_bias):
        no.append("sliding_window with qk_norm or qkv_bias")
    if no:
        raise UserError(f"model.{no[0]}: none of the Llama, Mistral, Qwen2 and Qwen3 families has it")
    if cfg.qk_norm:
        return "qwen3"
    if cfg.qkv_bias:
        return "qwen2"
    return "llama" if cfg.sliding_window is None else "mistral"


def to_hf_config(cfg: ModelConfig, dtype: str = "BF16") -> dict[str, Any]:
    """``config.json`` of the family that holds such a model."""
    if dtype not in DTYPE_NAMES:
        raise UserError(f"dtype {dtype}: an export has {', '.join(DTYPE_NAMES)}")
    family, rope = family_of(cfg), _to_rope(cfg.rope)
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.dim_per_head,
        "intermediate_size": cfg.d_ff,
        "vocab_size": cfg.vocab,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tied_embeddings,
        "rope_theta": cfg.rope.theta,
        "rope_parameters": rope,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    if cfg.rope.scaling != "none":
        out["rope_scaling"] = rope
    if family == "mistral":
        out["sliding_window"] = cfg.sliding_window
    return out


def _to_rope(rope: RopeConfig) -> dict[str, Any]:
    kind = "default" if rope.scaling == "none" else rope.scaling
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if kind != "default":
        out["factor"] = rope.factor
    if kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_seq_len
    if kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    return out


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a ``config.json`` describes; UserError for what it cannot express."""
    family = str(hf.get("model_type"))
    if family not in ARCHITECTURES:
        raise UserError(f"config.json: model_type={family}: import knows {', '.join(ARCHITECTURES)}")
    _refuse_unknown(hf)
    given = {**_DEFAULTS[family], **hf}

    def needed(name: str) -> Any:
        if given.get(name) is None:
            raise UserError(f"config.json: {name} is missing")
        return given[name]

    heads, width = needed("num_attention_heads"), needed("hidden_size")
    try:
        return ModelConfig(
            name=str(hf.get("_name_or_path") or family),
            n_layers=needed("num_hidden_layers"),
            d_model=width,
            n_heads=heads,
            n_kv_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or width // heads,
            d_ff=needed("intermediate_size"),
            vocab=needed("vocab_size"),
            max_seq_len=needed("max_position_embeddings"),
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            sliding_window=_window(given, family),
            rope=_from_rope(given),
            init_std=float(hf.get("initializer_range") or 0.02),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"config.json: {f'{where}: ' if where else ''}{first['msg']}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.json: a value is of the wrong kind ({error})") from None


def _refuse_unknown(hf: Mapping[str, Any]) -> None:
    for name, values in _ONLY.items():
        if hf.get(name) is not None and hf[name] not in values:
            raise UserError(f"config.json: {name}={hf[name]} is not supported, only {values[0]}")
    for name, value in hf.items():
        # Switched off, a key says nothing about the computation.
        if (
            name not in _READ
            and name not in _HARMLESS
            and name not in _ONLY
            and value not in (None, False, [], {}, "")
        ):
            raise UserError(
                f"config.json: {name}={value} is not understood, and may change what the model computes; remove it "
                "where it does not"
            )


def _window(hf: Mapping[str, Any], family: str) -> int | None:
    """The sliding window of all layers. UserError where some have one and some do not."""
    window = hf.get("sliding_window") if family == "mistral" else None
    kinds = hf.get("layer_types")
    if kinds is None and hf.get("use_sliding_window") and family.startswith("qwen"):
        # Their default: layers from max_window_layers on.
        sliding = hf.get("sliding_window", 4096) is not None
        kinds = ["sliding_attention"] * (
            sliding and hf.get("max_window_layers", 28) < hf["num_hidden_layers"]
        )
    mine = "full_attention" if window is None else "sliding_attention"
    if other := next((kind for kind in kinds or () if kind != mine), None):
        raise UserError(
            f"config.json: use_sliding_window or layer_types gives some layers {other}; one kind of attention for all "
            f"layers is supported, here {mine}"
        )
    return window


def _from_rope(hf: Mapping[str, Any]) -> RopeConfig:
    # Where both are there, transformers takes the older key.
    rope = {
        k: v for k, v in (hf.get("rope_scaling") or hf.get("rope_parameters") or {}).items() if v is not None
    }
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if nested := next((name for name, value in rope.items() if isinstance(value, Mapping)), None):
        raise UserError(f"config.json: rope_parameters.{nested}: one rope for all layers is supported")
    if kind not in _ROPE_KEYS:
        raise UserError(f"config.json: rope_type={kind} is not supported; {', '.join(_ROPE_KEYS)} are")
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10_000.0))
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise UserError("config.json: rope_parameters.partial_rotary_factor is not supported, only 1")
    if unknown := sorted(rope.keys() - _ROPE_KEYS[kind]):
        raise UserError(
            f"config.json: rope_parameters.{unknown[0]}={rope[unknown[0]]} is not understood with rope_type={kind}"
        )
    fields: dict[str, Any] = {"theta": float(theta), "scaling": "none" if kind == "default" else kind}
    if kind in ("llama3", "yarn"):
        fields["original_seq_len"] = (
            hf.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or hf["max_position_embeddings"]
        )
    if kind == "yarn" and "factor" not in rope and "original_seq_len" in fields:
        rope["factor"] = hf["max_position_embeddings"] / fields["original_seq_len"]
    for name in {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
                 "yarn": ("factor",)}.get(kind, ()):  # fmt: skip
        if name not in rope:
            raise UserError(f"config.json: rope_parameters.{name} is missing, which rope_type={kind} needs")
        fields[name] = float(rope[name])
    if kind == "yarn":
        fields |= {name: float(rope[name]) for name in ("beta_fast", "beta_slow") if rope.get(name)}
        fields["truncate"] = bool(rope.get("truncate", True))
        fields["attention_factor"] = _attention_factor(rope)
    return RopeConfig(**fields)


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """As ``transformers`` has it: said outright, or the ratio of two of DeepSeek's scales; None: YaRN's own."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all(scales):
        return None
    over, under = (0.1 * m * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0 for m in scales)
    return float(over / under)
