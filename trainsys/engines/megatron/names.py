"""Where the rows of a Megatron parameter lie in ours.

Megatron fuses what we keep apart: ``linear_qkv`` holds, for each group of heads that share keys, its queries, then
its key, then its value; ``linear_fc1`` of a gated feed-forward holds the gate's rows, then those of ``w_up``. Each
expert is a module of its own (``local_experts.3.linear_fc1.weight``), or a weight of a grouped one
(``linear_fc1.weight3``); ours are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainsys.config.model import ModelConfig
from trainsys.models.shards import ShardSpec


@dataclass(frozen=True)
class Rows:
    """Consecutive rows (entries, of a vector) of a local Megatron parameter, and the box of ours that they are."""

    first: int
    count: int
    name: str
    place: ShardSpec


@dataclass(frozen=True)
class Part:
    """What of the model this rank holds: ``index`` of ``size`` tensor-parallel ranks, experts from ``expert`` on."""

    size: int = 1
    index: int = 0
    first_expert: int = 0

    def share(self, n: int) -> tuple[int, int]:
        """[start, stop) of ``n`` rows or columns."""
        assert n % self.size == 0, (n, self.size)
        return self.index * n // self.size, (self.index + 1) * n // self.size


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(
    r"^mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.)?(?P<which>linear_fc[12])\.weight(?P<grouped>\d*)$"
)
_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "self_attention.q_layernorm.weight": "attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "attn.k_norm.weight",
}


def rows_of(name: str, layer_of: Callable[[int], int], cfg: ModelConfig, part: Part) -> Sequence[Rows]:
    """The rows of the parameter ``name`` of a model chunk; ``layer_of``: the chunk's i-th layer -> its number."""
    d = cfg.d_model
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        ours = "head.weight" if name.startswith("output") and not cfg.tied_embeddings else "embed.weight"
        return _split_rows(ours, (cfg.vocab, d), part)
    if name == "decoder.final_layernorm.weight":
        return _whole("norm.weight", (d,))
    match = _LAYER.match(name)
    assert match, f"no rule for the parameter {name}"
    prefix, rest = f"layers.{layer_of(int(match[1]))}.", match[2]
    if rest in _NORMS:
        return _whole(prefix + _NORMS[rest], (d if "attention" not in rest else cfg.dim_per_head,))
    if rest.startswith("self_attention.linear_qkv."):
        return _qkv(prefix + "attn.", rest.rpartition(".")[2], cfg, part)
    if rest == "self_attention.linear_proj.weight":
        return _split_columns(prefix + "attn.wo.weight", (d, cfg.n_heads * cfg.dim_per_head), part)
    return _feed_forward(prefix + "ffn.", rest, cfg, part)


def _feed_forward(prefix: str, rest: str, cfg: ModelConfig, part: Part) -> Sequence[Rows]:
    d, moe = cfg.d_model, cfg.moe
    if rest.startswith("mlp.linear_fc"):
        return _linear(rest.split(".")[1], prefix, ".weight", cfg.d_ff, cfg, part)
    assert moe is not None, f"no rule for the parameter {rest}"
    if rest == "mlp.router.weight":
        return _whole(prefix + "router.weight", (moe.n_experts, d))
    if rest.startswith("mlp.shared_experts.linear_fc"):
        return _linear(rest.split(".")[2], prefix + "shared.", ".weight", moe.shared_hidden, cfg, part)
    match = _EXPERT.match(rest)
    assert match, f"no rule for the parameter {rest}"
    expert = part.first_expert + int(match["one"] or match["grouped"])
    flat = _linear(match["which"], prefix + "experts.", "", moe.d_ff, cfg, part)
    return [Rows(r.first, r.count, r.name, _stacked(r.place, moe.n_experts, expert)) for r in flat]


def _linear(
    which: str, prefix: str, suffix: str, hidden: int, cfg: ModelConfig, part: Part
) -> Sequence[Rows]:
    """One of the two linears of a feed-forward of ``hidden`` units."""
    if which == "linear_fc2":
        return _split_columns(f"{prefix}w_down{suffix}", (cfg.d_model, hidden), part)
    names = ("w_gate", "w_up") if cfg.ffn_kind == "swiglu" else ("w_up",)
    start, stop = part.share(hidden)
    full, count = (hidden, cfg.d_model), stop - start
    return [
        Rows(i * count, count, f"{prefix}{name}{suffix}", ShardSpec.along(full, 0, start, stop))
        for i, name in enumerate(names)
    ]


def _qkv(prefix: str, kind: str, cfg: ModelConfig, part: Part) -> Sequence[Rows]:
    """Weight ``[rows, D]`` or bias ``[rows]`` of the fused projection, a group of heads after the other."""
    dim, rest = cfg.dim_per_head, (cfg.d_model,) if kind == "weight" else ()
    queries = cfg.n_heads // cfg.kv_heads * dim
    at, out = 0, []
    for group in range(*part.share(cfg.kv_heads)):
        for ours, count in (("wq", queries), ("wk", dim), ("wv", dim)):
            full = (cfg.kv_heads * count, *rest)
            place = ShardSpec.along(full, 0, group * count, (group + 1) * count)
            out.append(Rows(at, count, f"{prefix}{ours}.{kind}", place))
            at += count
    return out


def _whole(name: str, shape: tuple[int, ...]) -> Sequence[Rows]:
    return [Rows(0, shape[0], name, ShardSpec.whole(shape))]


def _split_rows(name: str, shape: tuple[int, int], part: Part) -> Sequence[Rows]:
    start, stop = part.share(shape[0])
    return [Rows(0, stop - start, name, ShardSpec.along(shape, 0, start, stop))]


def _split_columns(name: str, shape: tuple[int, int], part: Part) -> Sequence[Rows]:
    return [Rows(0, shape[0], name, ShardSpec.along(shape, 1, *part.share(shape[1])))]


def _stacked(place: ShardSpec, n_experts: int, expert: int) -> ShardSpec:
    return ShardSpec((n_experts, *place.full_shape), ((expert, expert + 1), *place.bounds))
