"""What decides which samples a run sees, in which order, and what is in them: one list of config fields.

A run that goes on from a checkpoint compares all of it, for its place in the data means nothing in another order. Every
field of ``DataConfig`` and ``TrainConfig`` has a place here, which a test demands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trainsys.config.run import RunConfig

Role = Literal["tokens", "order", "free"]
ROLES: dict[str, dict[str, Role]] = {
    "data": {
        "source": "tokens",
        "path": "tokens",
        "split": "tokens",
        "text_key": "tokens",
        "tokenizer": "tokens",
        "packing": "order",
        "document_mask": "order",
        "document_length": "free",
        "shuffle": "order",
        "cache_dir": "free",
        "prefetch": "free",
    },
    "train": {
        "steps": "free",
        "seq_len": "order",
        "global_batch": "order",
        "micro_batch": "free",
        "seed": "order",
        "dtype": "free",
        "device": "free",
        "init_from": "free",
        "loss_chunk": "free",
        "compile": "free",
        "attention": "free",
        "threads": "free",
    },
}
"""order: compared by value. tokens: compared by what comes of them, the fingerprint of the tokens, so that data may
move to another folder. free: never in a batch."""


def differences(
    was: Mapping[str, Any], was_data: Mapping[str, Any], cfg: RunConfig, data: Mapping[str, Any]
) -> list[str]:
    """One line for each thing that makes the batches of ``cfg`` others than those of the config tree ``was``.

    ``was_data``, ``data``: what the two sources say of themselves (``Source.describe``).
    """
    now = cfg.model_dump(mode="json")
    out = [
        f"{section}.{name} {was[section][name]} -> {now[section][name]}"
        for section, roles in ROLES.items()
        for name, role in roles.items()
        if role == "order" and name in was.get(section, {}) and was[section][name] != now[section][name]
    ]
    both = "tokens_fingerprint" in was_data and "tokens_fingerprint" in data
    kind = "tokens_fingerprint" if both else "fingerprint"
    if (before := was_data.get(kind)) != (after := data.get(kind)):
        out.append(f"data {before} -> {after}")
    return out


def samples_seen(was: Mapping[str, Any], samples: int | None, data_step: int, cfg: RunConfig) -> int:
    """The place in the data of ``cfg`` at which a run goes on that had seen ``samples`` of the config tree ``was``;
    None: ``data_step`` batches of its size.

    Windows of another length: as many as hold the same tokens.
    """
    train = was.get("train", {})
    if samples is None:
        samples = data_step * train.get("global_batch", cfg.train.global_batch)
    if cfg.data.packing == "concat" == was.get("data", {}).get("packing", "concat"):
        samples = samples * train.get("seq_len", cfg.train.seq_len) // cfg.train.seq_len
    return samples
