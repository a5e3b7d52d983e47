"""Hugging Face safetensors in and out, for the Llama, Mistral, Qwen2 and Qwen3 families; tensor by tensor.

Nothing is transposed: both hold linear weights as [out, in] and rotary halves alike, so an exchange is a table
of names and a table of config fields.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainsys.checkpoint.atoms import TORCH_DTYPES, AtomReader
from trainsys.checkpoint.container import Damaged, Entry, TensorFile, arrange, write_file
from trainsys.checkpoint.durable import sync_dir, write_durable
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.manifest import Atom, File, Manifest, Part
from trainsys.checkpoint.snapshot import key
from trainsys.config.model import ModelConfig, RopeConfig
from trainsys.errors import UserError
from trainsys.models.boxes import whole

SHARD_BYTES = 5 << 30
"""A file of an export; the size that the Hub's own tools cut at."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_RENAME = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^layers\.(\d+)\.attn\.w([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^layers\.(\d+)\.attn\.([qk]_norm)\.", r"model.layers.\1.self_attn.\2."),
    (r"^layers\.(\d+)\.ffn\.w_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)
_BACK = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.norm\.", "norm."),
    (r"^lm_head\.", "head."),
    (r"^model\.layers\.(\d+)\.input_layernorm\.", r"layers.\1.attn_norm."),
    (r"^model\.layers\.(\d+)\.post_attention_layernorm\.", r"layers.\1.ffn_norm."),
    (r"^model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.", r"layers.\1.attn.w\2."),
    (r"^model\.layers\.(\d+)\.self_attn\.([qk]_norm)\.", r"layers.\1.attn.\2."),
    (r"^model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"layers.\1.ffn.w_\2."),
)


def their_name(name: str) -> str:
    """The Hugging Face name of a canonical parameter; UserError where there is none."""
    return _translated(name, _RENAME)


def our_name(name: str) -> str:
    """The canonical name of a Hugging Face parameter; UserError where there is none."""
    return _translated(name, _BACK)


def _translated(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, n = re.subn(pattern, replacement, name)
        if n:
            return new
    raise UserError(f"tensor {name}: no counterpart in the Llama, Mistral, Qwen2 or Qwen3 families")


def export(checkpoint: Path, target: Path, dtype: str = "BF16", shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a checkpoint's weights as ``model-….safetensors``, index and ``config.json``; the tensor files.

    Holds one tensor in memory at a time beside the file's own pages. UserError for a model that no family has,
    a dtype unknown, or a target that has files.
    """
    from trainsys.checkpoint.inspect import open_checkpoint

    manifest = open_checkpoint(checkpoint)
    cfg = ModelConfig.model_validate(manifest.config.get("model", {}))
    config = to_hf_config(cfg, dtype)
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} has files; export into a new or empty folder")
    target.mkdir(parents=True, exist_ok=True)
    reader = AtomReader(checkpoint, manifest)
    names = sorted(name for name in manifest.atoms if "@" not in name)
    groups: list[list[Entry]] = [[]]
    for name in names:
        entry = Entry(their_name(name), dtype, manifest.atoms[name].shape)
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    back = {their_name(name): name for name in names}
    files, where = [], {}
    for i, group in enumerate(groups):
        path = target / (
            "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        head, _ = arrange(group, {"format": "pt"})
        write_file(path, head, (_bytes(reader.read(back[e.key]), dtype) for e in group))
        files.append(path)
        where |= {e.key: path.name for e in group}
    if len(groups) > 1:
        total = sum(e.nbytes for group in groups for e in group)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_durable(target / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
    write_durable(target / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    sync_dir(target)
    return files


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    """Rounded to nearest, as ``Tensor.to`` does."""
    return memoryview(tensor.to(TORCH_DTYPES[dtype]).contiguous().view(torch.uint8).numpy()).cast("B")


def import_(source: Path, folder: Path, dtype: str = "F32") -> Path:
    """Make a Hugging Face folder step 0 of a run's checkpoint ``folder``; where it is.

    One file in, one file out, one tensor in memory at a time. ``dtype`` is that of the master weights. UserError
    for another family, or a config field that the model cannot express.
    """
    config_file = source / "config.json"
    try:
        cfg = from_hf_config(json.loads(config_file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{config_file}: {error.strerror}; a Hugging Face model folder has one") from None
    except ValueError as error:
        raise UserError(f"{config_file}: {error}") from None
    paths = sorted(source.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{source}: no *.safetensors; save the model with safe_serialization=True")
    target = Folder(folder)
    saving = target.saving(0, f"import-{time.time_ns():x}")
    manifest = Manifest(
        step=0, data_step=0, updates=0, world=1, created_s=time.time(), engine="import", files=[], atoms={},
        config={"model": cfg.model_dump(mode="json")}, resumed_from=str(source),
    )  # fmt: skip
    for number, path in enumerate(paths):
        try:
            file = TensorFile(path)
        except Damaged as error:
            raise UserError(str(error)) from None
        kept = [e for e in file.entries.values() if not _left_out(e.key, cfg)]
        entries = [Entry(key(our_name(e.key), whole(e.shape)), dtype, e.shape) for e in kept]
        head, placed = arrange(entries)
        name = f"rank_00000_{number:03d}.safetensors"
        sha256 = write_file(saving / name, head, (_bytes(_tensor(file, e), dtype) for e in kept))
        manifest.files.append(File(name, (saving / name).stat().st_size, sha256))
        for theirs, entry in zip(kept, placed, strict=True):
            part = Part(number, entry.offset, whole(entry.shape))
            manifest.atoms[our_name(theirs.key)] = Atom(dtype, entry.shape, [part])
    missing = sorted(set(expected(cfg)) - manifest.atoms.keys())
    if missing or (extra := sorted(manifest.atoms.keys() - set(expected(cfg)))):
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not"
        raise UserError(f"{source} {what}: config.json and weights are not of one model")
    return target.root / target.commit(saving, manifest)


def expected(cfg: ModelConfig) -> Iterator[str]:
    """The canonical names of a model's parameters."""
    from trainsys.models.decoder import Decoder

    with torch.device("meta"):
        yield from dict(Decoder(cfg).named_parameters())


def _left_out(name: str, cfg: ModelConfig) -> bool:
    """A tied head that was saved all the same, and tables that older versions kept."""
    return name.endswith("rotary_emb.inv_freq") or (cfg.tied_embeddings and name == "lm_head.weight")


def _tensor(file: TensorFile, entry: Entry) -> Tensor:
    flat = torch.frombuffer(bytearray(file.data(entry.key)), dtype=TORCH_DTYPES[entry.dtype])
    return flat.view(entry.shape)


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
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if dtype not in names:
        raise UserError(f"dtype {dtype}: an export has {', '.join(names)}")
    family = family_of(cfg)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope.theta}
    if cfg.rope.scaling != "none":
        rope |= {
            "rope_type": cfg.rope.scaling,
            "factor": cfg.rope.factor,
            "original_max_position_embeddings": cfg.rope.original_seq_len,
        }
    if cfg.rope.scaling == "llama3":
        rope |= {"low_freq_factor": cfg.rope.low_freq_factor, "high_freq_factor": cfg.rope.high_freq_factor}
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
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
        "dtype": names[dtype],
        "torch_dtype": names[dtype],
    }
    if cfg.rope.scaling != "none":
        out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if cfg.sliding_window is not None:
        out["sliding_window"] = cfg.sliding_window
    return out


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a ``config.json`` describes; UserError for what it cannot express."""
    family = str(hf.get("model_type"))
    if family not in _ARCHITECTURES:
        raise UserError(f"model_type={family}: import knows {', '.join(_ARCHITECTURES)}")
    for name, value in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if hf.get(name, value) != value:
            raise UserError(f"config.json: {name}={hf[name]} is not supported, only {value}")
    if hf.get("use_sliding_window") and family.startswith("qwen"):
        raise UserError("config.json: use_sliding_window on some layers only is not supported")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {
        "theta": float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        "scaling": "none" if kind == "default" else kind,
    }
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(
            f"config.json: rope_type={kind} is not supported; default, linear, llama3 and yarn are"
        )
    if kind != "default":
        fields["factor"] = float(rope["factor"])
        if "original_max_position_embeddings" in rope:
            fields["original_seq_len"] = rope["original_max_position_embeddings"]
    for name in ("low_freq_factor", "high_freq_factor"):
        if kind == "llama3":
            fields[name] = float(rope[name])
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    return ModelConfig(
        name=str(hf.get("_name_or_path") or family),
        n_layers=hf["num_hidden_layers"],
        d_model=width,
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        d_ff=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        max_seq_len=hf.get("max_position_embeddings", 8192),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        sliding_window=hf.get("sliding_window") if family == "mistral" else None,
        rope=RopeConfig(**fields),
        init_std=float(hf.get("initializer_range", 0.02)),
    )
