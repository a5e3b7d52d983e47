"""What Megatron-LM's own reports would say of a run: theoretical memory, and throughput by forward time.

Both live in its training scripts or need CUDA, not in Megatron-Core on any device; these are their formulas, so that
their numbers stand beside ours in a run's event files (``megatron/...``). Ours are exact where these are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainsys.capabilities.megatron import stages
from trainsys.config.run import RunConfig
from trainsys.flops.params import layer_params
from trainsys.layout import Layout

FORWARD_SHARE = 3.0
"""A step computes about three times what its forward does: the amplification that its straggler detector assumes."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the most loaded rank."""

    states: float
    """Weights, gradients and optimizer"""
    activations: float


def theoretical_memory(cfg: RunConfig, layout: Layout) -> Memory:
    """As Megatron-LM's ``report_theoretical_memory``, for bf16 weights with fp32 gradients and optimizer.

    States: 18 bytes a parameter, of which the distributed optimizer shards 12. Activations of a layer: ``s b h (18 +
    4 f/h) / t`` with sequence parallelism and attention recomputed (Korthikanti et al. 2022, table 2), else ``s b h
    (10 + 24 / t)``, times the micro-batches in flight on the first stage.
    """
    m, train = cfg.model, cfg.train
    block = sum(layer_params(m, i).total for i in range(m.n_layers)) + m.d_model
    embedding = m.d_model * m.vocab
    held = (
        block / layout.pp + embedding * (2 if layout.pp == 1 and not m.tied_embeddings else 1)
    ) / layout.tp
    sharers = layout.dp_shard * layout.cp if cfg.megatron.distributed_optimizer else 1
    states = held * (6 + 12 / sharers)

    tokens = train.seq_len / layout.cp * train.micro_batch
    dense = cfg.parallel.sequence_parallel and cfg.recompute.policy == "selective"
    a_layer = (18 + 4 * m.d_ff / m.d_model) / layout.tp if dense else 10 + 24 / layout.tp
    share = 1 / layout.tp if dense else 1.0
    total = tokens * m.d_model * a_layer * m.n_layers + tokens * (8 + m.d_model) * layout.pp * share
    total *= _in_flight(cfg, layout)
    if layout.pp == 1:
        total += (4 if dense else 2) * tokens * (m.d_model * share + m.vocab / layout.tp)
    return Memory(states, total if dense else 1.05 * total)


def _in_flight(cfg: RunConfig, layout: Layout) -> float:
    """How much more than one micro-batch through all layers the first stage holds."""
    if layout.pp == 1:
        return 1.0
    virtual = stages(cfg, layout) // layout.pp
    if virtual > 1:
        return 1 + (layout.pp - 1) / (layout.pp * virtual)
    micros = math.ceil(cfg.train.global_batch / (layout.data_world * cfg.train.micro_batch))
    return min(1.0, micros / layout.pp)


def estimated_throughput(step_flops: float, forward_s: float, world: int) -> float:
    """FLOP/s of one rank as the straggler detector estimates it: from the time of its forward alone, of which a rank
    that waits for others has as much as they. ``step_flops``: of all ranks."""
    return step_flops / world / (FORWARD_SHARE * forward_s) if forward_s > 0 else 0.0
