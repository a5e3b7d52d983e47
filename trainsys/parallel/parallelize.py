"""Everything that turns a plain meta-device model into this rank's part of a parallel one, in order.

0. the pipeline stage                drops what other stages hold
1. tensor and sequence parallelism   slices parameters, so it comes before anything wraps them
2. expert parallelism                keeps some experts, of the width that is left
3. context parallelism               replaces the attention core, on the heads that are left
4. torch.compile, one block at a time
5. recomputation                     around what is compiled, as Dynamo does not enter a checkpointed region; inside
                                     FSDP's hooks, so that a recomputed block is gathered once
6. FSDP over dp_shard × cp           shards what is left of each parameter
7. materialise and initialise        each rank fills only what it holds
8. replicas                          buckets need the real parameters; who updates what is settled
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainsys.comm import ops
from trainsys.config.run import RunConfig
from trainsys.memory.recompute import apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights, local_part
from trainsys.models.shards import ShardSpec
from trainsys.ops.attention_kernels import named_kernel
from trainsys.optim.local import Owned
from trainsys.parallel.context.core import SequenceCut, apply_context_parallel
from trainsys.parallel.expert.apply import apply_expert_parallel
from trainsys.parallel.fsdp import apply_fsdp
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.cut import keep_part, pass_hidden
from trainsys.parallel.replica_shards import ReplicaShards
from trainsys.parallel.replicate import GradientBuckets, ShardSums
from trainsys.parallel.tensor import apply_tensor_parallel, needs_tp_reduction
from trainsys.schedules.partition import StagePart

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class ParallelModel:
    """A rank's part of the model, and how its gradients become those of the whole."""

    module: Decoder
    mesh: Mesh
    shards: dict[str, ShardSpec]
    """The shards that this rank holds."""
    owned: dict[str, Owned]
    """The shards that this rank updates."""
    units: list[FSDPModule]
    each: bool
    """the units' gradients are reduced after every micro-batch"""
    sums: ShardSums | None
    buckets: GradientBuckets | ReplicaShards | None
    tp_partial: list[Owned]
    cut: SequenceCut
    """what of each row is this rank's; to be applied to every batch"""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def set_sync(self, last: bool) -> None:
        """Before a backward: whether it is the step's last, until which gradients wait to be reduced over data ranks.

        Those of FSDP do not wait with ``each``: shards of them add up. Over replicas they are summed at the last.
        """
        if self.units:
            self.units[0].set_requires_gradient_sync(last or self.each)
            self.units[0].set_is_last_backward(last or self.each)
        if self.sums is not None:
            self.sums.last = last
        if self.buckets is not None:
            self.buckets.sync = last

    def finish_gradients(self) -> None:
        """After the last backward: wait for reductions, and sum what tp ranks computed in parts."""
        if self.sums is not None:
            self.sums.wait()
        if self.buckets is not None:
            self.buckets.wait()
        grads = [g for o in self.tp_partial if (g := o.grad) is not None and g.numel()]
        if grads:
            flat = ops.all_reduce_(torch.cat([g.reshape(-1) for g in grads]), self.mesh["tp"])
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])

    def share_weights(self) -> None:
        """After an update: what this rank holds and others updated."""
        if self.buckets is not None:
            self.buckets.share()

    def zero_gradients(self) -> None:
        held = set()
        if self.buckets is not None:
            self.buckets.zero()
            held = self.buckets.held
        for p in self.module.parameters():
            if p not in held:
                p.grad = None


def parallelize(cfg: RunConfig, mesh: Mesh, part: StagePart | None = None) -> ParallelModel:
    """Build ``cfg.model`` as this rank's part under ``mesh``, initialised from ``cfg.train.seed``.

    ``part``: one pipeline stage of it; None: the whole.
    """
    layout, parallel = mesh.layout, cfg.parallel
    dtype = DTYPES[cfg.train.dtype]
    with torch.device("meta"):
        model = Decoder(cfg.model, compute_dtype=dtype, layer_ids=None if part is None else part.layers)
    if part is not None:
        keep_part(model, part)
    sequence_parallel = parallel.sequence_parallel and layout.tp > 1
    shards = apply_tensor_parallel(
        model,
        mesh["tp"],
        sequence_parallel=sequence_parallel,
        loss_parallel=parallel.loss_parallel,
        overlap=parallel.overlap.tensor,
        streamed=[n for n, on in (("attn", cfg.recompute.stream_attention), ("ffn", cfg.recompute.stream_ffn)) if on],
    )
    if part is not None:
        pass_hidden(model, part)
    apply_expert_parallel(model, mesh, cfg, shards)
    apply_context_parallel(
        model,
        mesh,
        parallel.context,
        cfg.train.seq_len,
        overlap=parallel.overlap.context,
        kernel=named_kernel(cfg.train.attention),
    )
    if cfg.train.compile:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    apply_recompute(model, cfg.recompute)
    if cfg.train.loss_chunk and model.head is not None:
        # The loss multiplies by the head's weight itself; what TP hooks onto the head stays in force.
        model.head.forward = lambda hidden, *weight: hidden  # type: ignore[method-assign]
    replicas, over = mesh["dp_replicate"], parallel.shard
    overlap = parallel.overlap.gradients
    sums = None
    if replicas.size > 1 and over.optim == "as_params":
        sums = ShardSums(replicas, overlap=overlap)
    units = apply_fsdp(model, mesh, parallel.fsdp, dtype, sums) if mesh["fsdp"].size > 1 else []
    model.to_empty(device=mesh.device)
    # Ranks that differ only on these axes hold the same shard: replicas, and tp unless it splits the parameter.
    # What ep splits, tp splits as well.
    copies = {
        name: layout.dp_replicate * (layout.tp if spec.local_shape == spec.full_shape else 1)
        for name, spec in shards.items()
    }
    init_weights(model, cfg.model, cfg.train.seed, shards)
    shards = {name: local_part(p, shards[name])[1] for name, p in model.named_parameters()}
    owned: dict[str, Owned] = {
        name: Owned(p, shards[name], copies[name]) for name, p in model.named_parameters()
    }
    buckets: GradientBuckets | ReplicaShards | None = None
    # What FSDP does not hold, and so does not reduce: everything, or experts that no other rank of fsdp has.
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    if replicas.size > 1 and over.optim == "over_replicas":
        buckets = pieces = ReplicaShards(
            model.parameters(),
            replicas,
            parallel.bucket_mb,
            overlap=overlap,
            each_backward=over.grads == "over_replicas",
        )
        owned = {name: pieces.piece(o.param, o.place, o.copies) for name, o in owned.items()}
    elif plain and replicas.size > 1:
        buckets = GradientBuckets(plain, replicas, parallel.bucket_mb, overlap=overlap)
    tp_partial = [
        o for name, o in owned.items() if layout.tp > 1 and needs_tp_reduction(name, sequence_parallel)
    ]
    cut = SequenceCut(parallel.context, mesh["cp"], cfg.train.seq_len)
    each = layout.reduces_each_micro_batch(parallel)
    return ParallelModel(model, mesh, shards, owned, units, each, sums, buckets, tp_partial, cut)
