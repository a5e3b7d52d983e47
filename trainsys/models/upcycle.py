"""A dense checkpoint as the start of a mixture of experts (Komatsuzaki et al. 2022, sparse upcycling).

Every expert begins as a copy of the dense feed-forward, so whatever the router chooses, normalised gates add
up to one copy of it and the mixture computes what the dense model did. The router begins at random; experts
drift apart as they see different tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.flops.gemms import is_moe_layer
from trainsys.models.decoder import Decoder
from trainsys.models.init import initial_value

_EXPERT = re.compile(r"^layers\.(\d+)\.ffn\.experts\.(w_\w+)$")
_MADE = re.compile(r"^layers\.\d+\.ffn\.(router|shared)\.")
_BALANCE = re.compile(r"\.expert_bias$")


def dense_source(name: str) -> str | None:
    """The dense parameter that ``name`` of the mixture is made of: copies of it for stacked experts, itself for
    what both have. None for router and shared experts, which the dense model lacks."""
    if match := _EXPERT.match(name):
        return f"layers.{match[1]}.ffn.{match[2]}.weight"
    return None if _MADE.match(name) else name


def upcycle(dense: Mapping[str, Tensor], model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The state of ``model``, a mixture, that computes the logits of the ``dense`` state; canonical names.

    Routers start from ``seed`` like any parameter. Shared experts add nothing at first: their ``w_down`` is zero.
    Raises UserError where the logits could not be equal, or the shapes are not those of ``model``.
    """
    _refuse(model)
    assert model.moe is not None
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in Decoder(model).state_dict().items()}
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        source = dense_source(name)
        if _BALANCE.search(name) or name.endswith(".shared.w_down.weight"):
            out[name] = torch.zeros(shape)
        elif source is None:
            out[name] = initial_value(name, shape, model, seed)
        else:
            out[name] = _copies(dense, source, name, shape)
            if name.endswith(".experts.w_down"):
                out[name] /= model.moe.route_scale
    return out


def _copies(dense: Mapping[str, Tensor], source: str, name: str, shape: tuple[int, ...]) -> Tensor:
    if source not in dense:
        raise UserError(f"upcycling: {name} is made of {source}, which the dense checkpoint does not have")
    value = dense[source]
    stacked = source != name
    wanted = shape[1:] if stacked else shape
    if tuple(value.shape) != wanted:
        hint = "; model.moe.d_ff must be the dense d_ff" if stacked else ""
        raise UserError(f"upcycling: {source} is {list(value.shape)}, but {name} needs {list(wanted)}{hint}")
    return value.expand(shape).clone() if stacked else value.clone()


def _refuse(model: ModelConfig) -> None:
    """What makes the mixture's first logits others than the dense model's."""
    moe = model.moe
    if moe is None or not any(is_moe_layer(model, i) for i in range(model.n_layers)):
        raise UserError(f"upcycling: model {model.name} has no experts; give model.moe")
    if not moe.norm_topk:
        raise UserError(
            "upcycling: with model.moe.norm_topk=false gates do not add up to 1, so the first logits would not be "
            "the dense model's; set norm_topk=true"
        )
    if moe.capacity_factor is not None:
        raise UserError(
            f"upcycling: model.moe.capacity_factor={moe.capacity_factor} drops tokens at the first step; leave it "
            "out here (the weights fit a run that sets it)"
        )
