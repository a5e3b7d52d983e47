"""``train.init_from``: a new run whose weights come from a checkpoint, an export or a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainsys.checkpoint import hf
from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.compare import shape_differences
from trainsys.checkpoint.deepspeed_universal import is_one
from trainsys.checkpoint.inspect import open_checkpoint, resolve
from trainsys.checkpoint.manifest import Manifest
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import check, read_tensor
from trainsys.config.model import ModelConfig
from trainsys.config.run import RunConfig
from trainsys.engines.base import Engine
from trainsys.errors import UserError


@dataclass(frozen=True)
class Weights:
    """Weights that were checked and fit the model of the run."""

    path: Path
    manifest: Manifest
    notes: list[str] = field(default_factory=list)
    """What is not read, and what the run's model computes otherwise with them."""


def refuse_unused(cfg: RunConfig, own: Manifest | None) -> None:
    """UserError where the run has checkpoints of its own (``own``: the newest) that began with other weights than
    ``train.init_from``, which would not be read; or where that is one of them."""
    wanted = cfg.train.init_from
    if wanted is None:
        return
    root = Path(cfg.checkpoint_folder)
    if Path(wanted).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"train.init_from={wanted} is in {root}, where this run saves and goes on from; choose another name for a "
            "new run, or leave it out to go on with this one"
        )
    began = None if own is None else own.config.get("train", {}).get("init_from")
    if own is not None and (began is None or Path(began).resolve() != Path(wanted).resolve()):
        raise UserError(
            f"{root} holds step {own.step} of a run that began with {began or 'other weights'}, so "
            f"train.init_from={wanted} would not be read; choose another name to start from it, or leave it out to go on"
        )


def open_weights(cfg: RunConfig, ranks: Ranks) -> Weights:
    """What ``train.init_from`` names, the same on every rank. UserError where it is none of what can be read, is
    damaged, or does not fit ``cfg.model``, by key."""
    path = Path(cfg.train.init_from or "")

    def read() -> Weights:
        try:
            return _open(path, cfg.model)
        except UserError as error:
            raise UserError(f"train.init_from: {error}") from None

    opened = ranks.on_first(read)
    hashed = [f for f in opened.manifest.files if f.sha256]
    if wrong := check(opened.path, hashed, ranks):
        raise UserError(f"train.init_from: {opened.path} is damaged: {'; '.join(wrong)}")
    return opened


def _open(path: Path, model: ModelConfig) -> Weights:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a checkpoint, a run's checkpoint folder or a Hugging Face folder")
    if is_one(path):
        raise UserError(f"{path} is DeepSpeed's: `trainsys ckpt import {path} NEW_FOLDER` first, and name NEW_FOLDER")
    notes = []
    if hf.is_folder(path):
        manifest, unread = hf.open_folder(path)
        notes = [f"{path}: not read: {', '.join(unread)}"] if unread else []
    else:
        path = resolve(path)
        manifest = open_checkpoint(path)
    if was := manifest.config.get("model", {}):
        shapes, others = shape_differences(was, model)
        if shapes:
            raise UserError(f"{path} does not fit the model: {'; '.join(shapes)}")
        notes += [f"weights of {path} are used with another value: {line}" for line in others]
    return Weights(path, manifest, notes)


def load_weights(weights: Weights, engine: Engine) -> None:
    """Fill the engine's weights under any layout; its moments stay zero. UserError where a shape is another."""
    reader = AtomReader(weights.path, weights.manifest)
    with torch.no_grad():
        for t in engine.state():
            if "@" not in t.name:
                read_tensor(reader, t, cast=True)
    engine.resumed(0)
