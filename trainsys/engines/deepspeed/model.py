"""Our decoder, made ready for DeepSpeed: what `parallelize` does, less what DeepSpeed does itself."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from trainsys.comm import ops
from trainsys.config.run import RunConfig
from trainsys.engines.deepspeed.topology import Topology
from trainsys.memory.recompute import apply_recompute
from trainsys.models.attention import CoreAttention
from trainsys.models.decoder import Decoder
from trainsys.models.layers import TiedHead
from trainsys.models.shards import ShardSpec
from trainsys.ops.attention_rule import Rule
from trainsys.ops.documents import Documents
from trainsys.parallel.expert.apply import apply_expert_parallel, moe_layers
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import DTYPES
from trainsys.parallel.pipeline.cut import keep_part
from trainsys.parallel.tensor import apply_tensor_parallel, needs_tp_reduction
from trainsys.schedules.partition import StagePart


def build_model(
    cfg: RunConfig, mesh: Mesh, grad_scale: float, part: StagePart | None = None
) -> tuple[Decoder, dict[str, ShardSpec]]:
    """This rank's part on the meta device, and the place of every parameter in the full model.

    ``grad_scale``: by what gradients will be divided when they are reduced. ``part``: one pipeline stage.
    """
    with torch.device("meta"):
        ids = None if part is None else part.layers
        model = Decoder(cfg.model, compute_dtype=DTYPES[cfg.train.dtype], layer_ids=ids)
    if part is not None:
        keep_part(model, part)
    sequence_parallel = cfg.parallel.sequence_parallel and mesh.layout.tp > 1
    shards = apply_tensor_parallel(
        model, mesh["tp"], sequence_parallel=sequence_parallel, loss_parallel=cfg.parallel.loss_parallel
    )
    apply_expert_parallel(model, mesh, cfg, shards)
    for _, moe in moe_layers(model):
        # Its gradient is added as the loss's is scaled.
        moe.router.row_share *= grad_scale
    if mesh["cp"].size > 1:
        for block in model.layers.values():
            block.attn.core = UlyssesAttention(cfg.model.sliding_window, mesh)
    apply_recompute(model, cfg.recompute)
    if cfg.train.loss_chunk and model.head is not None:
        model.head.forward = lambda hidden, *weight: hidden  # type: ignore[method-assign]
    return model, shards


def materialise(
    model: Decoder, device: torch.device, zero3: dict[str, Any] | None = None, mpu: Topology | None = None
) -> None:
    """Memory for a model on the meta device, its values unset. With ZeRO 3 (``zero3``: the settings) module by
    module, each cut over the ranks before the next is made, so that no rank ever holds the whole."""
    if zero3 is None:
        model.to_empty(device=device)
    else:
        assert mpu is not None
        group = mpu.get_sequence_data_parallel_group()
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.to_empty(device=device, recurse=False)
                deepspeed.zero.Init(
                    module=_Own(module), config_dict_or_path=zero3, data_parallel_group=group, mpu=mpu
                )
        if isinstance(model.head, TiedHead):
            # It multiplies by a weight of another module, which has to be gathered for it as well.
            assert model.embed is not None
            deepspeed.zero.register_external_parameter(model.head, model.embed.weight)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


class _Own(nn.Module):
    """The parameters that are ``module``'s and not its children's, as ZeRO wants them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, p in module.named_parameters(recurse=False):
            self.register_parameter(name, p)


def tell_tensor_parallel(model: nn.Module, shards: dict[str, ShardSpec], mesh: Mesh, cfg: RunConfig) -> None:
    """Mark what tp splits, which counts once a rank in gradient norms, and sum over tp what its ranks compute in
    parts: in backward, before ZeRO takes the gradient."""
    tp = mesh["tp"]
    if tp.size == 1:
        return
    sequence_parallel = cfg.parallel.sequence_parallel
    for name, p in model.named_parameters():
        p.model_parallel = shards[name].local_shape != shards[name].full_shape  # type: ignore[attr-defined]
        if needs_tp_reduction(name, sequence_parallel):
            p.register_hook(lambda grad: ops.all_reduce_(grad.clone(), tp))


class UlyssesAttention(nn.Module):
    """In place of :class:`trainsys.models.attention.CoreAttention`: DeepSpeed's all-to-alls around it."""

    def __init__(self, window: int | None, mesh: Mesh) -> None:
        super().__init__()
        self._local, self._ranks = CoreAttention(window), mesh["cp"].size
        self._spread = DistributedAttention(self._local, mesh["cp"].group, scatter_idx=2, gather_idx=1)

    def prepare(self, positions: Tensor, docs: Documents | None) -> Rule | None:
        """``positions [B, S/cp]``; ``docs`` and what is returned are of whole rows, which attention has here."""
        b, part = positions.shape
        return self._local.prepare(positions.new_empty(b, part * self._ranks), docs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Rule | None) -> Tensor:
        """``q [B, S/cp, H, Dh]``, ``k, v [B, S/cp, K, Dh]`` -> ``[B, S/cp, H, Dh]``."""
        copies = max(1, self._ranks // k.shape[2])
        if copies > 1:
            # It wants a kv head a rank at least.
            k, v = k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)
        return self._spread(q, k, v, 0, None, prepared)
