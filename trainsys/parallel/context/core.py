"""Put a context-parallel flavour under the attention of every layer, and cut the batch to match."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from trainsys.comm.group import AxisGroup
from trainsys.comm.p2p import Link
from trainsys.config.run import ContextConfig
from trainsys.context.balance import ContextPlan, places, reach
from trainsys.data.packing import Batch
from trainsys.models.attention import SeamAttention
from trainsys.models.decoder import Decoder
from trainsys.ops.attention_kernels import Kernel
from trainsys.ops.attention_rule import Rule
from trainsys.ops.attention_seam import Method, WholeRows
from trainsys.parallel.context.all_gather import AllGatherKV
from trainsys.parallel.context.blocks import Blocks, Ring
from trainsys.parallel.context.dist_flash import DistFlash
from trainsys.parallel.context.pass_q import RingPassQ
from trainsys.parallel.context.ring import RingPassKV
from trainsys.parallel.context.token_ring import TokenRing
from trainsys.parallel.context.two_d import DoubleRing
from trainsys.parallel.context.ulysses import spread_heads, spread_tokens
from trainsys.parallel.mesh import Mesh

ONE_RING = {"ring": RingPassKV, "pass_q": RingPassQ, "token_ring": TokenRing, "dist_flash": DistFlash}


class ContextAttention(SeamAttention):
    """Takes the place of :class:`trainsys.models.attention.CoreAttention`: this rank holds part of each row.

    ``heads``: the ranks that share heads by all-to-all; a group of one where the flavour has none.
    """

    def __init__(self, window: int | None, heads: AxisGroup, method: Method) -> None:
        super().__init__(window, method)
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Rule) -> Tensor:
        """``q [B, S/cp, H, Dh]``, ``k, v [B, S/cp, K, Dh]`` -> ``[B, S/cp, H, Dh]``."""
        if self.heads.size > 1:
            q, k, v = spread_heads(q, k, v, self.heads)
        out = super().forward(q, k, v, prepared)
        return spread_tokens(out, self.heads) if self.heads.size > 1 else out


def apply_context_parallel(
    model: Decoder,
    mesh: Mesh,
    cfg: ContextConfig,
    seq: int,
    *,
    overlap: bool = True,
    kernel: Kernel | None = None,
) -> None:
    """Replace the attention cores of ``model`` by ones that work on this rank's part of rows of ``seq`` tokens.

    ``overlap``: compute one block while the next one's data travels. ``kernel``: what computes a block, and
    whole rows where cp is 1; None: the device's own.
    """
    cp, window = mesh["cp"], model.cfg.sliding_window
    if cp.size == 1:
        if kernel is not None:
            for block in model.layers.values():
                block.attn.core = SeamAttention(window, WholeRows(kernel))
        return
    plan = ContextPlan.resolve(cfg, cp.size)
    heads, method = build_method(plan, mesh, seq, window, Blocks(kernel), overlap=overlap)
    for block in model.layers.values():
        block.attn.core = ContextAttention(window, heads, method)


def build_method(
    plan: ContextPlan,
    mesh: Mesh,
    seq: int,
    window: int | None,
    blocks: Blocks | None = None,
    *,
    overlap: bool = True,
) -> tuple[AxisGroup, Method]:
    """The group that shares heads and the method that moves the rest, for this rank. Every rank must call it."""
    cp, blocks = mesh["cp"], blocks or Blocks()
    member = plan.ring_index(cp.index)
    shards = tuple(plan.ring_shard(seq, i) for i in range(plan.ring))
    ring = Ring(member, shards, reach(plan, seq, window))
    heads = mesh.subgroup("cp", [[plan.at(h, r) for h in range(plan.heads)] for r in range(plan.ring)])
    if plan.flavour == "all_gather":
        return heads, AllGatherKV(ring, cp, blocks, overlap=overlap)
    if plan.flavour in ONE_RING:
        return heads, ONE_RING[plan.flavour](ring, Link(cp, overlap=overlap), blocks)
    if plan.ring == 1:
        return heads, WholeRows(blocks.kernel)
    # Groups of their own, so that on NCCL neither ring's transfers queue behind the other's.
    inner = [
        [plan.at(h, o * plan.inner + i) for i in range(plan.inner)]
        for h in range(plan.heads)
        for o in range(plan.outer)
    ]
    outer = [
        [plan.at(h, o * plan.inner + i) for o in range(plan.outer)]
        for h in range(plan.heads)
        for i in range(plan.inner)
    ]
    links = [Link(mesh.subgroup("cp", some), overlap=overlap) for some in (inner, outer)]
    return heads, DoubleRing(ring, *links, blocks)


class SequenceCut:
    """This rank's part of each row of a batch of ``seq`` tokens."""

    def __init__(self, cfg: ContextConfig, cp: AxisGroup, seq: int) -> None:
        self.places: np.ndarray | None = None
        if cp.size > 1:
            self.places = np.array(places(ContextPlan.resolve(cfg, cp.size).shard(seq, cp.index)))

    def __call__(self, batch: Batch) -> Batch:
        """Tokens, labels and positions ``[B, S/cp]``. Documents stay ``[B, S]``: attention asks for those of
        tokens held elsewhere. Counts stay those of the whole rows."""
        if self.places is None:
            return batch
        tokens, labels, positions = (
            np.ascontiguousarray(a[:, self.places]) for a in (batch.tokens, batch.labels, batch.positions)
        )
        return replace(batch, tokens=tokens, labels=labels, positions=positions)
