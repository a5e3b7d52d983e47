"""The feed-forward of one layer; ``build_ffn`` chooses its kind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainsys.config.model import ModelConfig
from trainsys.flops.gemms import is_moe_layer
from trainsys.models.layers import Linear
from trainsys.models.moe import MoE


class SwiGLU(nn.Module):
    """``w_down(silu(w_gate x) * w_up x)`` (Shazeer 2020, section 2)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_gate = Linear(d_model, d_ff)
        self.w_up = Linear(d_model, d_ff)
        self.w_down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Gelu(nn.Module):
    """``w_down(gelu(w_up x))`` with GPT-2's tanh form of gelu (Hendrycks & Gimpel 2016)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_up = Linear(d_model, d_ff)
        self.w_down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.gelu(self.w_up(x), approximate="tanh"))


def build_ffn(cfg: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward of layer ``layer``: a module ``x [B, S, D] -> [B, S, D]``."""
    kind = {"swiglu": SwiGLU, "gelu": Gelu}[cfg.ffn_kind]
    if not is_moe_layer(cfg, layer):
        return kind(cfg.d_model, cfg.d_ff)
    assert cfg.moe is not None
    shared = kind(cfg.d_model, cfg.moe.shared_hidden) if cfg.moe.shared_hidden else None
    return MoE(cfg, shared)
