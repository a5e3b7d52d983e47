"""Tensor and sequence parallelism: slice the parameters, put collectives around attention and feed-forward.

Megatron-LM's scheme (Shoeybi et al. 2019; sequence parallelism: Korthikanti et al. 2022): the first
linear of a pair is split by output, the second by input, so that one collective enters the pair and one
leaves it. The modules compute on the local slices and never know. With sequence parallelism the residual
stream and the norms between the pairs hold S/tp tokens, the entering collective is an all-gather and the
leaving one a reduce-scatter, at the same bytes as the two all-reduces they replace.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainsys.comm import autograd as comm
from trainsys.comm.group import AxisGroup
from trainsys.comm.p2p import Link
from trainsys.models.decoder import Decoder
from trainsys.models.layers import Embedding
from trainsys.models.moe import MoE
from trainsys.models.shards import ShardSpec
from trainsys.parallel.tensor_overlap import overlap_pair
from trainsys.parallel.tensor_products import enter_pair

SEQUENCE_DIM = 1  # of [B, S, D]
VOCAB_DIM = 2  # of [B, S, V]

# Which dim of each parameter is split over tp. Everything else is held whole on every tp rank.
SPLIT_DIM = (
    (re.compile(r"(^|\.)(embed|head)\.weight$"), 0),
    (re.compile(r"\.attn\.w[qkv]\.(weight|bias)$"), 0),
    (re.compile(r"\.attn\.wo\.weight$"), 1),
    (re.compile(r"\.ffn\.(shared\.)?(w_gate|w_up)\.weight$"), 0),
    (re.compile(r"\.ffn\.(shared\.)?w_down\.weight$"), 1),
    (re.compile(r"\.ffn\.experts\.(w_gate|w_up)$"), 1),
    (re.compile(r"\.ffn\.experts\.w_down$"), 2),
)
NORM = re.compile(r"(^|[._])norm\.(weight|bias)$")
HEAD_NORM = re.compile(r"\.attn\.[qk]_norm\.weight$")
ROUTER = re.compile(r"\.router\.weight$")


def split_dim(name: str) -> int | None:
    """The dim of the named parameter that tensor parallelism splits; None: replicated."""
    return next((dim for pattern, dim in SPLIT_DIM if pattern.search(name)), None)


def slice_parameters(model: nn.Module, tp: AxisGroup) -> dict[str, ShardSpec]:
    """Replace each split parameter of a meta-device model by one of the local shape.

    Returns the place of every parameter, split or not, within the full model.
    """
    shards: dict[str, ShardSpec] = {}
    for name, param in list(model.named_parameters()):
        dim = split_dim(name) if tp.size > 1 else None
        if dim is None:
            shards[name] = ShardSpec.whole(param.shape)
            continue
        assert param.is_meta, "slice before materialising"
        part, rest = divmod(param.shape[dim], tp.size)
        assert not rest, f"{name}: {param.shape[dim]} over {tp.size}; Layout.validate should have refused"
        place = ShardSpec.along(param.shape, dim, tp.index * part, (tp.index + 1) * part)
        owner, _, attribute = name.rpartition(".")
        local = nn.Parameter(torch.empty(place.local_shape, dtype=param.dtype, device="meta"))
        setattr(model.get_submodule(owner), attribute, local)
        shards[name] = place
    return shards


def needs_tp_reduction(name: str, sequence_parallel: bool) -> bool:
    """Whether each tp rank computes only its part of this parameter's gradient.

    With sequence parallelism every norm sees S/tp tokens; norms over head_dim always see H/tp heads. A router
    sees every token, but scales what is one part of the experts' output.
    """
    return bool(HEAD_NORM.search(name) or ROUTER.search(name)) or (
        sequence_parallel and bool(NORM.search(name))
    )


def apply_tensor_parallel(
    model: Decoder,
    tp: AxisGroup,
    *,
    sequence_parallel: bool,
    loss_parallel: bool,
    overlap: bool = False,
    streamed: Collection[str] = (),
) -> dict[str, ShardSpec]:
    """Slice ``model`` (on meta) and hook the collectives in. Returns each parameter's place.

    ``overlap``: attention and dense feed-forwards multiply part by part of the sequence (`tensor_overlap`).
    ``streamed``: those of ``attn`` and ``ffn`` that call their linears piece by piece.
    """
    shards = slice_parameters(model, tp)
    if tp.size == 1:
        return shards

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        x = comm.gather(x, tp, SEQUENCE_DIM) if sequence_parallel else comm.copy(x, tp)
        return (x, *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return comm.scatter_sum(out, tp, SEQUENCE_DIM) if sequence_parallel else comm.reduce(out, tp)

    for block in model.layers.values():
        for name, pair in (("attn", block.attn), ("ffn", block.ffn)):
            if overlap and not isinstance(pair, MoE):
                overlap_pair(pair, Link(tp))
                continue
            if isinstance(pair, MoE) or name in streamed:
                pair.register_forward_pre_hook(enter)
            else:
                enter_pair(pair, tp, SEQUENCE_DIM if sequence_parallel else None)
            pair.register_forward_hook(leave)
    if model.embed is not None:
        model.embed = SplitEmbedding(model.embed, shards["embed.weight"].bounds[0][0])
        model.embed.register_forward_hook(leave)
    if model.head is not None:
        model.head.register_forward_pre_hook(enter)
        if not loss_parallel:
            model.head.register_forward_hook(lambda module, args, logits: comm.concat(logits, tp, VOCAB_DIM))
    return shards


class SplitEmbedding(nn.Module):
    """The rows ``[first, first + len(weight))`` of an embedding; other tokens give zeros, which the sum fills in."""

    def __init__(self, embed: Embedding, first: int) -> None:
        super().__init__()
        self.weight = embed.weight
        self.first, self.out_dtype = first, embed.out_dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [B, S] int64 -> [B, S, D]``."""
        local = tokens - self.first
        foreign = (local < 0) | (local >= self.weight.shape[0])
        out = F.embedding(local.masked_fill(foreign, 0), self.weight).to(self.out_dtype)
        return out.masked_fill(foreign.unsqueeze(-1), 0.0)
