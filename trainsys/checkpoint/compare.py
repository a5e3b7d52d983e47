"""A checkpoint's config beside a run's, key by key: what makes it another model, and what else is not as it was.

Compared is what values resolve to: ``head_dim: null`` is ``d_model / n_heads``, and a number that the chosen rope does
not read is none. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trainsys.checkpoint.manifest import Manifest
from trainsys.config.model import ModelConfig
from trainsys.config.run import OptimConfig, RunConfig
from trainsys.config.text import flat
from trainsys.optim.schedule import learning_rate

_FREE = {"name", "max_seq_len", "init_std", "moe.aux_loss_coef", "moe.bias_update_rate"}
"""Model settings that neither the weights nor the forward depend on."""
_ROPE = {
    "none": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_seq_len", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_seq_len", "beta_fast", "beta_slow", "truncate", "attention_factor"},
}
_SAME_SHAPES = (
    "norm_eps", "sliding_window", "rope.", "moe.top_k", "moe.score", "moe.norm_topk", "moe.route_scale", "moe.n_groups",
    "moe.top_groups", "moe.capacity_factor",
)  # fmt: skip
"""Model settings that a new run may change and still load the weights."""
_COMPARED = ("model", "optim", "train", "recompute", "data")
_QUIET = {
    "model.name", "train.micro_batch", "train.threads", "train.device", "train.init_from", "data.cache_dir",
    "data.prefetch",
}  # fmt: skip
"""Run settings that the result does not depend on."""


def resolved(model: ModelConfig) -> dict[str, Any]:
    """What a model is, by dotted key, with every default that depends on something else filled in."""
    values = flat(model.model_dump(mode="json"))
    values |= {"n_kv_heads": model.kv_heads, "head_dim": model.dim_per_head}
    rope = model.rope
    values["rope.attention_factor"] = rope.temperature
    unread = {f"rope.{name}" for name in type(rope).model_fields} - {
        f"rope.{name}" for name in ("theta", "scaling", *_ROPE[rope.scaling])
    }
    if model.moe is not None:
        values["moe.shared_d_ff"] = model.moe.shared_hidden
        unread.add("moe.n_shared_experts")
    return {name: value for name, value in values.items() if name not in unread | _FREE}


def model_differences(was: Mapping[str, Any], model: ModelConfig) -> list[tuple[str, str]]:
    """(key, line) of each thing in which the model of the config tree ``was`` is another one than ``model``."""
    mine = resolved(model)
    try:
        theirs = resolved(ModelConfig.model_validate(was))
    except ValidationError:  # a field that this version does not have, or not any more
        theirs = {name: was_value for name, was_value in flat(was).items() if name in mine or was_value is not None}
        theirs = {name: value for name, value in theirs.items() if name not in _FREE}
    return [
        (name, f"model.{name}: checkpoint {_shown(theirs.get(name))}, run {_shown(mine.get(name))}")
        for name in sorted(theirs.keys() | mine.keys())
        if theirs.get(name) != mine.get(name)
    ]


def shape_differences(was: Mapping[str, Any], model: ModelConfig) -> tuple[list[str], list[str]]:
    """The same in two lists: what weights cannot be used for, and what they can be but compute otherwise with."""
    both = model_differences(was, model)
    return (
        [line for name, line in both if not name.startswith(_SAME_SHAPES)],
        [line for name, line in both if name.startswith(_SAME_SHAPES)],
    )


def changes(was: Manifest, cfg: RunConfig, layout: Mapping[str, int], world: int) -> list[str]:
    """What is not as it was when ``was`` was saved, one short line each; the next step's learning rate among them."""
    out = []
    if was.engine != cfg.engine:
        out.append(f"engine {was.engine} → {cfg.engine}")
    before, after = _axes(was.layout), _axes(layout)
    if before != after:
        out.append(f"layout {before} → {after}")
    if was.world != world:
        out.append(f"world {was.world} → {world}")
    old, new = flat(was.config), flat(cfg.model_dump(mode="json"))
    sections = (*_COMPARED, *(s for s in ("deepspeed", "megatron") if cfg.engine == was.engine == s))
    out += [
        f"{name} {_shown(old[name])} → {_shown(new[name])}"
        for name in new
        if name in old and old[name] != new[name] and name.split(".")[0] in sections and name not in _QUIET
    ]
    return out + _rate(was, cfg)


def _rate(was: Manifest, cfg: RunConfig) -> list[str]:
    """The learning rate of the step that comes next, where the old config would have given another one."""
    try:
        old = OptimConfig.model_validate(was.config["optim"], strict=False)
        before = learning_rate(old, was.step, int(was.config["train"]["steps"]))
    except (KeyError, ValidationError):
        return []
    now = learning_rate(cfg.optim, was.step, cfg.train.steps)
    same = abs(before - now) <= 1e-9 * max(abs(before), abs(now))
    return [] if same else [f"lr at step {was.step}: {before:.3g} → {now:.3g}"]


def _axes(layout: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={n}" for axis, n in layout.items() if n > 1) or "one process"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
