"""A mixture made of a dense model says at first what the dense model said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.errors import UserError
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.models.upcycle import dense_source, upcycle

SHAPE: dict[str, Any] = {
    "n_layers": 3, "d_model": 16, "n_heads": 2, "d_ff": 24, "vocab": 40, "qk_norm": True, "init_std": 0.2,
}  # fmt: skip
DENSE = ModelConfig(**SHAPE)
TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(11).expand(2, 11)


def dense_model(cfg: ModelConfig = DENSE) -> Decoder:
    decoder = Decoder(cfg)
    init_weights(decoder, cfg, seed=5)
    return decoder


def logits(decoder: Decoder) -> torch.Tensor:
    return decoder(TOKENS, POSITIONS)


KINDS: dict[str, dict[str, Any]] = {
    "top2": {},
    "top1": {"top_k": 1},
    "deepseek": {"score": "sigmoid", "balance": "bias", "route_scale": 2.5, "n_shared_experts": 1},
    "some layers": {"n_dense_layers": 2},
}


@pytest.mark.parametrize("ffn_kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_logits_are_the_dense_model_s(kind: str, ffn_kind: str) -> None:
    dense = dense_model(DENSE.model_copy(update={"ffn_kind": ffn_kind}))
    moe = MoEConfig(**{"n_experts": 4, "top_k": 2, "d_ff": 24, **KINDS[kind]})
    cfg = ModelConfig(**SHAPE, ffn_kind=ffn_kind, moe=moe)
    mixture = Decoder(cfg)
    mixture.load_state_dict(upcycle(dense.state_dict(), cfg, seed=1))
    want = logits(dense)
    assert (logits(mixture) - want).abs().max() < 1e-5 * want.abs().max()
    # It is a mixture that learns: every expert that was used has its own gradient, and so has the router.
    logits(mixture).square().sum().backward()
    last = mixture.layers["2"].ffn
    assert last.router.weight.grad is not None
    if moe.top_k > 1 or moe.balance == "aux_loss":
        assert last.router.weight.grad.abs().max() > 0
    used = last.router.load[:-1] > 0
    assert (last.experts.w_up.grad.flatten(1).abs().amax(1) > 0).tolist() == used.tolist()


def test_routers_are_those_of_the_seed() -> None:
    cfg = ModelConfig(**SHAPE, moe=MoEConfig(n_experts=4, top_k=2, d_ff=24))
    fresh = Decoder(cfg)
    init_weights(fresh, cfg, seed=9)
    made = upcycle(dense_model().state_dict(), cfg, seed=9)
    name = "layers.1.ffn.router.weight"
    assert torch.equal(made[name], fresh.state_dict()[name])


def test_sources_by_name() -> None:
    assert dense_source("layers.7.ffn.experts.w_up") == "layers.7.ffn.w_up.weight"
    assert dense_source("layers.7.attn.wq.weight") == "layers.7.attn.wq.weight"
    assert dense_source("layers.7.ffn.router.weight") is None
    assert dense_source("layers.7.ffn.shared.w_up.weight") is None


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        (None, "has no experts"),
        ({"n_dense_layers": 3}, "has no experts"),
        ({"norm_topk": False}, "norm_topk=true"),
        ({"capacity_factor": 1.0}, "drops tokens"),
        ({"d_ff": 12}, "model.moe.d_ff must be the dense d_ff"),
    ],
)
def test_refusals(moe: dict[str, Any] | None, says: str) -> None:
    given = None if moe is None else MoEConfig(**{"n_experts": 4, "top_k": 2, "d_ff": 24, **moe})
    with pytest.raises(UserError, match=says) as caught:
        upcycle(dense_model().state_dict(), ModelConfig(**SHAPE, moe=given), seed=0)
    assert "\n" not in str(caught.value)


def test_a_missing_parameter_is_named() -> None:
    state = dense_model().state_dict()
    del state["layers.0.ffn.w_up.weight"]
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.w_up\.weight"):
        upcycle(state, ModelConfig(**SHAPE, moe=MoEConfig(n_experts=4, top_k=2, d_ff=24)), seed=0)
