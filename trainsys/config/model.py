"""The shape of a model: what FLOPs, memory, layouts and the model builder all read. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainsys.config.base import Strict


class RopeConfig(Strict):
    """Rotary position embedding (Su et al. 2021) and its stretching to longer sequences."""

    theta: PositiveFloat = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_seq_len: PositiveInt = 8192
    beta_fast: PositiveFloat = Field(
        default=32.0, description="yarn: rotations over the original length above which a frequency is kept"
    )
    beta_slow: PositiveFloat = Field(
        default=1.0, description="yarn: rotations below which it is divided by factor"
    )
    truncate: bool = Field(
        default=True, description="yarn: the ramp between the two starts and ends at whole i"
    )
    attention_factor: PositiveFloat | None = Field(
        default=None, description="yarn: what cos and sin are multiplied by; None: 0.1 ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        for name in ("beta_fast", "beta_slow", "truncate", "attention_factor"):
            if self.scaling != "yarn" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for scaling=yarn, not {self.scaling}; leave it out")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}")
        return self

    @property
    def temperature(self) -> float:
        """What cos and sin are multiplied by: YaRN's 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22), else 1."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" and self.factor > 1 else 1.0


class MoEConfig(Strict):
    """Token-choice mixture of experts in place of the dense feed-forward."""

    n_experts: PositiveInt
    top_k: PositiveInt
    d_ff: PositiveInt = Field(description="hidden size of one routed expert")
    n_shared_experts: int = Field(default=0, ge=0)
    shared_d_ff: int = Field(
        default=0, ge=0, description="hidden size of all shared experts together; 0: n_shared * d_ff"
    )
    n_dense_layers: int = Field(
        default=0, ge=0, description="leading layers that keep the dense feed-forward"
    )
    score: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk: bool = True
    route_scale: PositiveFloat = 1.0
    n_groups: PositiveInt = Field(
        default=1, description="groups of experts, of which a token uses top_groups (DeepSeek-V3)"
    )
    top_groups: PositiveInt = 1
    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    aux_loss_coef: float = Field(
        default=1e-2, ge=0, description="aux_loss: of the mean over rows and layers' sum"
    )
    bias_update_rate: float = Field(default=1e-3, ge=0, description="bias: how far it moves in a step")
    capacity_factor: PositiveFloat | None = Field(
        default=None, description="of each row: an expert takes this times its even share; None: dropless"
    )

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} is more than n_experts={self.n_experts}")
        if self.n_experts % self.n_groups:
            raise ValueError(f"n_experts={self.n_experts} does not divide into n_groups={self.n_groups}")
        if self.top_groups > self.n_groups:
            raise ValueError(f"top_groups={self.top_groups} is more than n_groups={self.n_groups}")
        reach = self.top_groups * (self.n_experts // self.n_groups)
        if self.top_k > reach:
            raise ValueError(
                f"top_k={self.top_k} is more than the {reach} experts of top_groups={self.top_groups}"
            )
        for field, balance in (("aux_loss_coef", "aux_loss"), ("bias_update_rate", "bias")):
            default = type(self).model_fields[field].default
            if self.balance != balance and getattr(self, field) != default:
                raise ValueError(f"{field} is for balance={balance}, not {self.balance}; leave it out")
        return self

    @property
    def shared_hidden(self) -> int:
        return self.shared_d_ff or self.n_shared_experts * self.d_ff


class ModelConfig(Strict):
    """A decoder-only transformer. Defaults are Llama's choices."""

    name: str = "custom"
    n_layers: PositiveInt = Field(le=10_000)
    d_model: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = Field(default=None, description="None: as many as n_heads (no grouping)")
    head_dim: PositiveInt | None = Field(default=None, description="None: d_model / n_heads")
    d_ff: PositiveInt
    ffn_kind: Literal["swiglu", "gelu"] = "swiglu"
    vocab: PositiveInt
    max_seq_len: PositiveInt = 8192
    tied_embeddings: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    qk_norm: bool = Field(default=False, description="RMSNorm over head_dim of queries and keys, as in Qwen3")
    qkv_bias: bool = False
    parallel_block: bool = Field(
        default=False, description="attention and FFN read the same normed input (GPT-J, PaLM)"
    )
    sliding_window: PositiveInt | None = Field(default=None, description="keys a query sees, itself included")
    rope: RopeConfig = RopeConfig()
    init_std: PositiveFloat = 0.02
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.kv_heads}")
        if self.dim_per_head % 2:
            raise ValueError(f"head_dim={self.dim_per_head} is odd: rotary embedding needs pairs")
        if self.moe is not None and self.moe.n_dense_layers > self.n_layers:
            raise ValueError(f"moe.n_dense_layers={self.moe.n_dense_layers} of n_layers={self.n_layers}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads
