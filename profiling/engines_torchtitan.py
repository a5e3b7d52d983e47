"""torchtitan's Llama under torchtitan's own parallelism, with our weights and batches: a peer of engines_benchmark.

Of torchtitan 0.3: the model, its sharding declarations, tensor parallelism and FSDP; the loop around them is the
benchmark's plain one, for its trainer wants a GPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.models import llama3
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from trainsys.config.run import RunConfig
from trainsys.models.init import initial_value

_OURS = {
    "tok_embeddings": "embed", "lm_head": "head", "attention.qkv_linear.": "attn.", "attention.wo": "attn.wo",
    "attention_norm": "attn_norm", "feed_forward.w1": "ffn.w_gate", "feed_forward.w2": "ffn.w_down",
    "feed_forward.w3": "ffn.w_up",
}  # fmt: skip


def canonical(name: str) -> str:
    """``layers.0.feed_forward.w1.weight`` -> ``layers.0.ffn.w_gate.weight``."""
    for theirs, ours in _OURS.items():
        name = name.replace(theirs, ours)
    return name


def build_model(cfg: RunConfig) -> nn.Module:
    """Parallelized under the layout of ``cfg``, from our initial weights."""
    m, parallel = cfg.model, cfg.parallel
    world = dist.get_world_size()
    llama3.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
    nothing = {"weight": lambda weight: weight}
    config = llama3.Llama3Model.Config(
        dim=m.d_model,
        vocab_size=m.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=m.vocab, embedding_dim=m.d_model, param_init=nothing),
        norm=RMSNorm.Config(normalized_shape=m.d_model, param_init=nothing),
        lm_head=Linear.Config(in_features=m.d_model, out_features=m.vocab, param_init=nothing),
        layers=llama3._build_llama3_layers(
            n_layers=m.n_layers, dim=m.d_model, n_heads=m.n_heads, hidden_dim=m.d_ff, fuse_qkv=False,
            rope=CosSinRoPE.Config(dim=m.dim_per_head, max_seq_len=cfg.train.seq_len, theta=m.rope.theta),
            attn_backend="sdpa",
        ),
    )  # fmt: skip
    parallelism = ParallelismConfig(
        data_parallel_replicate_degree=parallel.dp_replicate,
        data_parallel_shard_degree=parallel.dp_shard,
        tensor_parallel_degree=parallel.tp,
        enable_sequence_parallel=parallel.sequence_parallel,
        spmd_backend="partial_dtensor",
    )
    set_llama3_sharding_config(config, enable_sp=parallel.sequence_parallel)
    parallel_dims.device_type = "cpu"
    dims = ParallelDims.from_config(parallelism, world)
    dims.build_mesh()
    with torch.device("meta"):
        model = config.build()
    training = TrainingConfig(mixed_precision_param="float32", mixed_precision_reduce="float32")
    llama3.parallelize_llama(
        model, parallel_dims=dims, training=training, parallelism=parallelism,
        compile_config=CompileConfig(), ac_config=None, dump_folder="",
    )  # fmt: skip
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = initial_value(canonical(name), p.shape, cfg.model, cfg.train.seed)
            if isinstance(p, DTensor):
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements))
            else:
                p.copy_(value)
    return model


def titan_step(cfg: RunConfig):  # type: ignore[no-untyped-def]  # the benchmark's Step
    from engines_benchmark import by_hand

    model = build_model(cfg)

    def logits(tokens: Tensor, positions: Tensor) -> Tensor:
        out = model(tokens)
        return out.full_tensor() if isinstance(out, DTensor) else out

    return by_hand(cfg, model, logits, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
