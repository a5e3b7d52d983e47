"""Experts over ``ep``: keep this rank's, and put the dispatch between router and experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from trainsys.config.run import ExpertConfig, RunConfig
from trainsys.context.balance import ContextPlan, places
from trainsys.models.decoder import Decoder
from trainsys.models.moe import MoE
from trainsys.models.shards import ShardSpec
from trainsys.parallel.expert.dispatch import ExpertDispatch, RouteMaker
from trainsys.parallel.expert.route import FlatRouter, TwoLevelRouter
from trainsys.parallel.expert.rows import CutRows
from trainsys.parallel.mesh import Mesh


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """(name, module) of each mixture in ``model``, in order."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module


def apply_expert_parallel(model: Decoder, mesh: Mesh, cfg: RunConfig, shards: dict[str, ShardSpec]) -> None:
    """Narrow the experts of a meta-device ``model`` to those of this rank, in ``shards`` too, and make every
    router's statistics those of the global batch. After tensor parallelism, which splits each expert's width.

    Every rank of the world must call it.
    """
    layers = list(moe_layers(model))
    if not layers and mesh["ep"].size == 1:
        return
    ep, cp = mesh["ep"], mesh["cp"]
    dispatch = ExpertDispatch(route_maker(mesh, cfg.parallel.expert), cfg.parallel.expert.chunks)
    for name, moe in layers:
        # A mean over the rows of the global batch; every tp rank computes all of it, and they are summed.
        moe.router.row_share = 1.0 / (cfg.train.global_batch * mesh["tp"].size)
        if cp.size > 1:
            plan = ContextPlan.resolve(cfg.parallel.context, cp.size)
            seq = cfg.train.seq_len
            moe.router.rows = CutRows(cp, [places(plan.shard(seq, r)) for r in range(cp.size)])
        if ep.size == 1:
            continue
        moe.dispatch = dispatch
        for kind, param in list(moe.experts.named_parameters()):
            assert param.is_meta, "narrow before materialising"
            full = f"{name}.experts.{kind}"
            each = param.shape[0] // ep.size
            shards[full] = shards[full].narrow(0, ep.index * each, (ep.index + 1) * each)
            local = torch.empty(shards[full].local_shape, dtype=param.dtype, device="meta")
            setattr(moe.experts, kind, nn.Parameter(local))


def route_maker(mesh: Mesh, cfg: ExpertConfig) -> RouteMaker:
    """What finds rows' way over ``ep``. Every rank of the world must call it."""
    ep = mesh["ep"]
    if cfg.dispatch == "flat":
        return FlatRouter(ep)
    inner = cfg.node_ranks
    assert inner is not None, "Layout.validate should have refused"
    nodes = range(0, ep.size, inner)
    node = mesh.subgroup("ep", [[first + i for i in range(inner)] for first in nodes])
    across = mesh.subgroup("ep", [[first + i for first in nodes] for i in range(inner)])
    return TwoLevelRouter(node, across)
