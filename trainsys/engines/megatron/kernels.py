"""Which optional kernels Megatron-Core gets on this machine: what is installed, and what the run lets it use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainsys.config.run import RunConfig

TRANSFORMER_ENGINE = "transformer_engine.pytorch"
ACCUMULATION = "fused_weight_gradient_mlp_cuda"
"""apex's extension, which multiplies a weight's gradient straight into the fp32 buffer"""

_INSTALL = {
    TRANSFORMER_ENGINE: "pip install 'transformer-engine[pytorch]' (2 or later)",
    ACCUMULATION: "NVIDIA apex, built with its CUDA extensions",
}

Has = Callable[[str], bool]
"""Whether a module of this name can be imported."""


@dataclass(frozen=True)
class Kernels:
    linears: bool = False
    """Transformer Engine's in place of Megatron's own"""
    grouped_experts: bool = False
    """all experts of a rank in one grouped product, Transformer Engine's"""
    rotary: bool = False
    """Transformer Engine's rotary embedding in one kernel"""
    activation: bool = False
    """gate and product of swiglu in one compiled kernel"""
    accumulation: bool = False
    """weight gradients are added into the fp32 buffer by the product itself"""
    missing: tuple[str, ...] = ()
    """what would bring the others"""

    def __str__(self) -> str:
        """One line: what is on, and what is missing."""
        named = {
            "Transformer Engine's linears": self.linears,
            "grouped experts": self.grouped_experts,
            "fused rope": self.rotary,
            "fused swiglu": self.activation,
            "fused gradient accumulation": self.accumulation,
        }
        on = ", ".join(name for name, here in named.items() if here) or "none"
        return f"megatron kernels: {on}" + "".join(f"; for more: {what}" for what in self.missing)


PLAIN = Kernels()


def importable(name: str) -> bool:
    """False, too, for a library that was built for another torch or CUDA."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def kernels_for(cfg: RunConfig, device: torch.device, has: Has = importable) -> Kernels:
    """None on CPU, or with ``megatron.kernels=plain``.

    Attention is not among them: it is ours, by torch's fused kernels, so Megatron's masked softmax is never reached.
    Megatron fuses gelu with the bias of a linear, and our linears have none.
    """
    if device.type == "cpu" or cfg.megatron.kernels == "plain":
        return PLAIN
    engine, accumulation = has(TRANSFORMER_ENGINE), has(ACCUMULATION)
    return Kernels(
        linears=engine,
        grouped_experts=engine and cfg.model.moe is not None,
        # Its kernel knows one position per column, the same in all rows, and does not scale.
        rotary=engine and not cfg.data.document_mask and cfg.model.rope.temperature == 1.0,
        activation=cfg.model.ffn_kind == "swiglu",
        accumulation=accumulation,
        missing=tuple(
            _INSTALL[name] for name, here in ((TRANSFORMER_ENGINE, engine), (ACCUMULATION, accumulation)) if not here
        ),
    )
