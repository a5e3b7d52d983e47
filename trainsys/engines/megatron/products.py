"""Transformer Engine's linears and grouped experts, put into Megatron's own specification of its layers.

Norms, rotary angles and attention stay what they are (`modules`): so parameters keep their names and shapes, but for
grouped experts, and the norm in front of a linear stays a module of its own, which Transformer Engine could fuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Products:
    """Classes of Megatron's that wrap Transformer Engine's."""

    column: Any
    row: Any
    column_grouped: Any
    row_grouped: Any
    grouped_mlp: Any


def transformer_engine() -> Products:
    """Needs Transformer Engine."""
    te = import_module("megatron.core.extensions.transformer_engine")
    experts = import_module("megatron.core.transformer.moe.experts")
    return Products(
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        te.TEColumnParallelGroupedLinear,
        te.TERowParallelGroupedLinear,
        experts.TEGroupedMLP,
    )


def use_transformer_engine(block: Any, te: Products, *, grouped: bool) -> None:
    """In every layer of a block's specification; ``grouped``: experts as one module."""
    for layer in block.layer_specs:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        attention.linear_qkv, attention.linear_proj = te.column, te.row
        experts = getattr(mlp, "experts", None)
        if experts is None:
            mlp.linear_fc1, mlp.linear_fc2 = te.column, te.row
            continue
        for part in (experts, mlp.shared_experts):
            part.submodules.linear_fc1, part.submodules.linear_fc2 = te.column, te.row
        if grouped:
            # The local experts' submodules may be those of the shared ones, too.
            submodules = type(experts.submodules)(linear_fc1=te.column_grouped, linear_fc2=te.row_grouped)
            experts.module, experts.submodules = te.grouped_mlp, submodules
