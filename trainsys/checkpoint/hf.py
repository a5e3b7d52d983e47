"""Hugging Face safetensors in and out, for the Llama, Mistral, Qwen2 and Qwen3 families; tensor by tensor.

Nothing is transposed: both hold linear weights as [out, in] and rotary halves alike, so an exchange is a table
of names and a table of config fields (``hf_config``).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainsys.checkpoint.atoms import TORCH_DTYPES, AtomReader
from trainsys.checkpoint.container import Damaged, Entry, TensorFile, arrange, write_file
from trainsys.checkpoint.durable import sync_dir, write_durable
from trainsys.checkpoint.folder import importing, new_folder
from trainsys.checkpoint.hf_config import from_hf_config, to_hf_config
from trainsys.checkpoint.manifest import Atom, File, Manifest, Part
from trainsys.checkpoint.snapshot import key
from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.models.boxes import whole

SHARD_BYTES = 5 << 30
"""A file of an export; the size that the Hub's own tools cut at."""
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"^model-(\d+)-of-(\d+)\.safetensors$")
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
    new_folder(target)
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


def import_(
    source: Path, folder: Path, dtype: str = "F32", say: Callable[[str], None] = lambda text: None
) -> Path:
    """Make a Hugging Face folder step 0 of a new run's checkpoint ``folder``; where it is.

    One file in, one file out, one tensor in memory at a time. ``dtype`` is that of the master weights. ``say`` takes
    a line about files that are not read. UserError as :func:`open_folder`, and for a ``folder`` that is used.
    """
    held, unread = open_folder(source)
    if unread:
        say(f"not read: {', '.join(unread)}")
    manifest = Manifest(
        step=0, data_step=0, samples=0, updates=0, world=1, created_s=time.time(), engine="import", files=[], atoms={},
        config=held.config, resumed_from=str(source),
    )  # fmt: skip
    reader = AtomReader(source, held)
    with importing(folder, 0) as (target, saving):
        for number in range(len(held.files)):
            names = [n for n, atom in held.atoms.items() if atom.parts[0].file == number]
            entries = [Entry(key(n, whole(held.atoms[n].shape)), dtype, held.atoms[n].shape) for n in names]
            head, placed = arrange(entries)
            file = saving / f"rank_00000_{number:03d}.safetensors"
            sha256 = write_file(file, head, (_bytes(reader.read(n), dtype) for n in names))
            manifest.files.append(File(file.name, file.stat().st_size, sha256))
            for name, entry in zip(names, placed, strict=True):
                part = Part(number, entry.offset, whole(entry.shape))
                manifest.atoms[name] = Atom(dtype, entry.shape, [part])
        return target.root / target.commit(saving, manifest)


def is_folder(path: Path) -> bool:
    """Whether it looks like a Hugging Face model folder."""
    return (path / "config.json").is_file()


def open_folder(source: Path) -> tuple[Manifest, list[str]]:
    """A Hugging Face folder as the checkpoint of step 0 that it is (files without hashes, atoms by canonical names),
    and the names of safetensors files in it that are not the model's.

    UserError for another family, a config value that the model cannot express, weights that are missing, or of
    another shape than config.json says.
    """
    config_file = source / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{config_file}: {error.strerror}; a Hugging Face model folder has one") from None
    except ValueError as error:
        raise UserError(f"{config_file}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file}: not a mapping")
    try:
        cfg = from_hf_config(config)
    except UserError as error:
        raise UserError(f"{source}/{error}") from None
    names, where, unread = _weight_files(source)
    manifest = Manifest(
        step=0, data_step=0, samples=0, updates=0, world=1, engine="import", files=[], atoms={},
        config={"model": cfg.model_dump(mode="json")},
    )  # fmt: skip
    shapes = expected(cfg)
    for number, name in enumerate(names):
        try:
            file = TensorFile(source / name)
        except Damaged as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{source / name}: {error.strerror}, but {INDEX} names it") from None
        manifest.files.append(File(name, (source / name).stat().st_size, ""))
        for e in file.entries.values():
            if _left_out(e.key, cfg) or (where is not None and where.get(e.key) != name):
                continue
            ours = our_name(e.key)
            if ours in manifest.atoms:
                raise UserError(f"{source}: {e.key} is in {name} and in another file; remove the stale one")
            _check(source / name, e, shapes.get(ours))
            manifest.atoms[ours] = Atom(e.dtype, e.shape, [Part(number, e.offset, whole(e.shape))])
    if missing := sorted(shapes.keys() - manifest.atoms.keys()):
        raise UserError(
            f"{source} lacks {their_name(missing[0])}: config.json and weights are not of one model, or a file is missing"
        )
    return manifest, unread


def _check(path: Path, e: Entry, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise UserError(
            f"{path} has {e.key}, which the model of config.json does not: they are not of one model"
        )
    if e.shape != shape:
        raise UserError(
            f"{path}: {e.key} is {list(e.shape)}, config.json says {list(shape)}: they are not of one model"
        )
    if e.dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{path}: {e.key} is {e.dtype}; quantized weights are not supported")


def _weight_files(source: Path) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """The files of the weights, what the index says about tensors (None: there is no index), and other files."""
    there = sorted(p.name for p in source.glob("*.safetensors"))
    if not there:
        raise UserError(f"{source}: no *.safetensors; save the model with safe_serialization=True")
    shards = [name for name in there if _SHARD.match(name)]
    where: dict[str, str] | None = None
    if (source / INDEX).is_file():
        try:
            where = dict(json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source / INDEX}: not an index of weights ({error})") from None
        if wrong := next((name for name in where.values() if Path(str(name)).name != name), None):
            raise UserError(f"{source / INDEX}: {wrong} is no file of this folder")
        names = sorted(set(where.values()))
    elif "model.safetensors" in there and shards:
        raise UserError(
            f"{source}: model.safetensors and {shards[0]}, and no {INDEX} that says which; remove the stale ones"
        )
    elif "model.safetensors" in there:
        names = ["model.safetensors"]
    elif shards:
        numbers, totals = zip(
            *(match.groups() for name in shards if (match := _SHARD.match(name))), strict=True
        )
        if {int(n) for n in numbers} != set(range(1, int(totals[0]) + 1)) or len(set(totals)) > 1:
            raise UserError(
                f"{source}: {', '.join(shards)} are not one whole set of files, and there is no {INDEX}"
            )
        names = shards
    elif len(there) == 1:
        names = there
    else:
        raise UserError(f"{source}: {', '.join(there)}, and no {INDEX} that says which are the model's")
    return names, where, [name for name in there if name not in names]


def expected(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, by canonical name."""
    from trainsys.models.decoder import Decoder

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(cfg).named_parameters()}


def _left_out(name: str, cfg: ModelConfig) -> bool:
    """A tied head that was saved all the same, and tables that older versions kept."""
    return name.endswith("rotary_emb.inv_freq") or (cfg.tied_embeddings and name == "lm_head.weight")
