"""Our configuration as Megatron-Core's: process groups, ``TransformerConfig``, model chunks, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import RunConfig
from trainsys.context.balance import ContextPlan
from trainsys.engines.megatron.kernels import PLAIN, Kernels
from trainsys.engines.megatron.modules import HeadNorm, Norm, Rotary, core_for
from trainsys.engines.megatron.products import transformer_engine, use_transformer_engine
from trainsys.errors import UserError
from trainsys.flops.gemms import is_moe_layer
from trainsys.layout import Layout
from trainsys.models.attention import CoreAttention
from trainsys.parallel.context.core import ContextAttention, build_method
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import DTYPES
from trainsys.schedules.build import stages_per_rank

if not hasattr(moe_utils, "te_general_gemm"):
    # 0.16 asks for it without having looked whether Transformer Engine is there.
    moe_utils.te_general_gemm = None


def axes_of(layout: Layout) -> dict[str, str]:
    """As what the collectives of Megatron's groups count, by the name it gives a group. Several groups have the same
    ranks where axes have size 1, and only the name tells what a call was for."""
    data = (
        "fsdp"
        if layout.dp_replicate == 1
        else ("loss" if layout.dp_shard * layout.cp > 1 else "dp_replicate")
    )
    return {
        "TENSOR_MODEL_PARALLEL_GROUP": "tp",
        "EXPERT_TENSOR_PARALLEL_GROUP": "tp",
        "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
        "EMBEDDING_GROUP": "pp",
        "CONTEXT_PARALLEL_GROUP": "cp",
        "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "cp" if layout.cp > 1 else "tp",
        "EXPERT_MODEL_PARALLEL_GROUP": "ep",
        "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep" if layout.ep > 1 else "tp",
        "EXPERT_DATA_PARALLEL_GROUP": "expert_fsdp",
        "DATA_PARALLEL_GROUP": data,
        "DATA_PARALLEL_GROUP_WITH_CP": data,
        "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "fsdp",
        "MODEL_PARALLEL_GROUP": "world",
        "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "world",
        "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "world",
        "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    }


def virtual_stages(cfg: RunConfig, layout: Layout) -> int | None:
    """Stages a rank holds under the interleaved schedule; None: one."""
    pipeline = cfg.parallel.pipeline
    if layout.pp == 1 or pipeline.schedule != "interleaved_1f1b":
        return None
    return stages_per_rank(pipeline.schedule, pipeline.virtual_stages)


def instances(cfg: RunConfig, layout: Layout) -> int:
    """Copies of the sharded optimizer state: the replicas, where it is sharded at all."""
    return layout.dp_replicate if cfg.megatron.distributed_optimizer else 1


def join(cfg: RunConfig, layout: Layout, device: torch.device) -> None:
    """Make Megatron's process groups, which it keeps in globals: one engine a process at a time."""
    if not dist.is_initialized():
        # It communicates in a world of one, too.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    # Placed as our layout: tp innermost, pp outermost.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_stages(cfg, layout),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.tp,
        num_distributed_optimizer_instances=instances(cfg, layout),
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    # Nothing that we train draws random numbers: weights are ours, and there is no dropout.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def transformer_config(
    cfg: RunConfig, layout: Layout, device: torch.device, kernels: Kernels = PLAIN
) -> TransformerConfig:
    """Raises nothing for what `trainsys.capabilities.megatron` lets through."""
    m, dtype = cfg.model, DTYPES[cfg.train.dtype]
    on_cpu = device.type == "cpu"
    activation = F.silu if m.ffn_kind == "swiglu" else partial(F.gelu, approximate="tanh")
    full = cfg.recompute.policy == "full"
    # Its schedule without interleaving cannot go on computing while it sends.
    overlap_pipeline = cfg.parallel.overlap.pipeline and virtual_stages(cfg, layout) is not None
    made = TransformerConfig(
        num_layers=m.n_layers,
        hidden_size=m.d_model,
        num_attention_heads=m.n_heads,
        num_query_groups=m.kv_heads,
        kv_channels=m.dim_per_head,
        ffn_hidden_size=m.d_ff,
        gated_linear_unit=m.ffn_kind == "swiglu",
        activation_func=activation,
        normalization="RMSNorm" if m.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=m.norm_eps,
        qk_layernorm=m.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=m.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        bias_activation_fusion=kernels.activation,
        # Compiled when first used; on CPU plain operations.
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=kernels.accumulation,
        apply_rope_fusion=kernels.rotary,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=cfg.parallel.sequence_parallel and layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_stages(cfg, layout),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.tp,
        # gloo sends from the memory itself, which must stay until it has.
        deallocate_pipeline_outputs=not on_cpu,
        overlap_p2p_comm=overlap_pipeline,
        batch_p2p_comm=not overlap_pipeline,
        # The loss is divided by the tokens of the whole batch beforehand: reductions are plain sums.
        calculate_per_token_loss=True,
        recompute_granularity={"full": "full", "selective": "selective"}.get(cfg.recompute.policy),
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        **(_experts(m, m.moe, cfg, layout, kernels) if m.moe is not None else {}),
    )
    if m.rope.temperature != 1.0:
        if m.rope.factor <= 1:
            raise UserError(
                "engine=megatron: model.rope.attention_factor needs model.rope.factor above 1; use engine=native"
            )
        # The frequencies are ours; these make its attention multiply cos and sin by 0.1 mscale ln(factor) + 1.
        made.yarn_rotary_scaling_factor, made.yarn_mscale_all_dim = m.rope.factor, 0.0
        made.yarn_mscale = (m.rope.temperature - 1.0) / (0.1 * math.log(m.rope.factor))
    return made


def _experts(
    model: ModelConfig, moe: MoEConfig, cfg: RunConfig, layout: Layout, kernels: Kernels
) -> dict[str, Any]:
    tokens = cfg.train.seq_len // (layout.cp * (layout.tp if cfg.parallel.sequence_parallel else 1))
    # It multiplies a micro-batch's mean over rows by the tokens held here; ours is a mean over all rows of the step.
    coefficient = moe.aux_loss_coef * cfg.train.micro_batch / cfg.train.global_batch / tokens
    return {
        "num_moe_experts": moe.n_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.d_ff,
        "moe_shared_expert_intermediate_size": moe.shared_hidden or None,
        "moe_layer_freq": [int(is_moe_layer(model, i)) for i in range(model.n_layers)],
        "moe_router_score_function": moe.score,
        # Over the chosen only is the same as over all and then normalised.
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.norm_topk,
        "moe_router_topk_scaling_factor": moe.route_scale if moe.route_scale != 1.0 else None,
        "moe_router_num_groups": moe.n_groups if moe.n_groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.n_groups > 1 else None,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.balance == "aux_loss" else "none",
        "moe_aux_loss_coeff": coefficient if moe.balance == "aux_loss" else 0.0,
        "moe_router_enable_expert_bias": moe.balance == "bias",
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": kernels.grouped_experts,
    }


@dataclass
class Chunks:
    """This rank's stages, and what their attention computes by."""

    wrapped: list[Any]
    rotaries: list[Rotary]
    core: CoreAttention | ContextAttention

    @property
    def plain(self) -> list[GPTModel]:
        return [chunk.module for chunk in self.wrapped]


def model_chunks(
    cfg: RunConfig, config: TransformerConfig, mesh: Mesh, kernels: Kernels = PLAIN
) -> Chunks:
    """Uninitialised, on the run's device, gradients reduced by Megatron's data parallelism."""
    core = _core(cfg, mesh)
    chunks, rotaries = [], []
    stages = virtual_stages(cfg, mesh.layout) or 1
    for stage in range(stages):
        which = {"vp_stage": stage if stages > 1 else None}
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, **which)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, **which)
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, **which
        )
        _replace_modules(spec, core_for(core))
        if kernels.linears:
            use_transformer_engine(spec, transformer_engine(), grouped=kernels.grouped_experts)
        model = GPTModel(
            config,
            spec,
            vocab_size=cfg.model.vocab,
            max_sequence_length=cfg.train.seq_len,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=cfg.model.tied_embeddings,
            position_embedding_type="rope",
            **which,
        ).to(mesh.device)
        _mark_split(model)
        model.rotary_pos_emb = Rotary(cfg.model, mesh.device)
        rotaries.append(model.rotary_pos_emb)
        chunks.append(model)
    overlap = cfg.parallel.overlap.gradients and mesh["fsdp"].size * mesh["dp_replicate"].size > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and cfg.megatron.distributed_optimizer,
        use_distributed_optimizer=cfg.megatron.distributed_optimizer,
        num_distributed_optimizer_instances=instances(cfg, mesh.layout),
        bucket_size=math.ceil(cfg.parallel.bucket_mb * 1e6 / 4),
    )
    wrapped = [
        DistributedDataParallel(config, replace(ddp), chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    return Chunks(wrapped, rotaries, core)


def _mark_split(model: nn.Module) -> None:
    """Say which weights tensor parallelism splits: the gradient norm asks, and Megatron's own initialisation, which
    would have said it, does not run."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, True, 1, 1)


def _core(cfg: RunConfig, mesh: Mesh) -> CoreAttention | ContextAttention:
    window = cfg.model.sliding_window
    if mesh["cp"].size == 1:
        return CoreAttention(window)
    plan = ContextPlan.resolve(cfg.parallel.context, mesh["cp"].size)
    method = build_method(plan, mesh, cfg.train.seq_len, window, overlap=cfg.parallel.overlap.context)
    return ContextAttention(window, *method)


def _replace_modules(block: Any, core: type[nn.Module]) -> None:
    """Put ours into a block's specification; layers share theirs, so some are met several times."""
    block.layer_norm = Norm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = core
        for norm in ("q_layernorm", "k_layernorm"):
            if "Norm" in getattr(getattr(attention, norm), "__name__", ""):
                setattr(attention, norm, HeadNorm)


def optimizer_for(cfg: RunConfig, chunks: Chunks) -> Any:
    """AdamW over this rank's part; it decays matrices alone, as ours. Learning rates are set step by step."""
    optim = cfg.optim
    made = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip_norm,
            bf16=cfg.train.dtype == "bf16",
            params_dtype=DTYPES[cfg.train.dtype],
            use_distributed_optimizer=cfg.megatron.distributed_optimizer,
        ),
        chunks.wrapped,
        use_gloo_process_groups=False,
    )
    for group in made.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return made
