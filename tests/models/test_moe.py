"""The mixture of experts on one rank, against the plainest code that does the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.flops import batch_flops, param_counts
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.models.moe import MoE
from trainsys.models.router import Router, expert_capacity, within_capacity
from trainsys.ops import grouped

BASE: dict[str, Any] = {"n_experts": 8, "top_k": 2, "d_ff": 12}


def model(**moe: Any) -> ModelConfig:
    return ModelConfig(
        n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab=40, init_std=0.2, moe=MoEConfig(**{**BASE, **moe})
    )


def mixture(cfg: ModelConfig) -> MoE:
    decoder = Decoder(cfg)
    init_weights(decoder, cfg, seed=3)
    return decoder.layers["1"].ffn  # type: ignore[return-value,union-attr]


def plain(moe: MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert, in one row's order; capacity counted by hand."""
    cfg, router, experts = moe.router.cfg, moe.router, moe.experts
    rows = []
    for row in x:
        room = [math.inf] * cfg.n_experts
        if cfg.capacity_factor is not None:
            room = [expert_capacity(len(row), cfg.top_k, cfg.n_experts, cfg.capacity_factor)] * cfg.n_experts
        for token in row:
            logits = router.weight @ token
            scores = logits.softmax(0) if cfg.score == "softmax" else logits.sigmoid()
            ranked = scores if router.expert_bias is None else scores + router.expert_bias
            chosen = ranked.argsort(descending=True)[: cfg.top_k].tolist()
            total = sum(scores[e] for e in chosen) if cfg.norm_topk else 1.0
            out = torch.zeros_like(token) if moe.shared is None else moe.shared(token)
            for e in chosen:
                room[e] -= 1
                if room[e] >= 0:
                    assert experts.w_gate is not None
                    hidden = F.silu(experts.w_gate[e] @ token) * (experts.w_up[e] @ token)
                    out = out + scores[e] / total * cfg.route_scale * (experts.w_down[e] @ hidden)
            rows.append(out)
    return torch.stack(rows).view_as(x)


KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "switch": {"top_k": 1, "norm_topk": False},
    "deepseek": {"score": "sigmoid", "balance": "bias", "route_scale": 2.5, "n_shared_experts": 1},
    "tight": {"capacity_factor": 0.6},
    "loose": {"capacity_factor": 8.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_token_by_token(kind: str) -> None:
    moe = mixture(model(**KINDS[kind]))
    if moe.router.expert_bias is not None:
        moe.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    moe.router.row_share = 0.0  # the auxiliary loss has its own test
    x = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out, want = moe(x), plain(moe, x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *moe.parameters()]
    got = torch.autograd.grad((out * probe).sum(), leaves)
    expected = torch.autograd.grad((want * probe).sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(g.abs().sum() > 0 for g in got)


def test_gelu_experts_have_no_gate() -> None:
    cfg = model().model_copy(update={"ffn_kind": "gelu"})
    moe = mixture(cfg)
    assert moe.experts.w_gate is None
    x = torch.randn(1, 1, 16)
    choice, gate = moe.router(x).choices[0, 0], moe.router(x).gates[0, 0]
    want = sum(
        g * (moe.experts.w_down[e] @ F.gelu(moe.experts.w_up[e] @ x[0, 0], approximate="tanh"))
        for e, g in zip(choice, gate, strict=True)
    )
    torch.testing.assert_close(moe(x)[0, 0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_loss_is_switch_s_a_row_at_a_time(score: str) -> None:
    cfg = model(score=score, aux_loss_coef=0.5)
    router = mixture(cfg).router
    router.row_share = 0.25
    x = torch.randn(4, 9, 16)
    routing = router(x)
    routing.gates.mul(0.0).sum().backward()  # nothing but the auxiliary loss
    got, router.weight.grad = router.weight.grad, None
    total = torch.zeros(())
    for row in x:
        logits = row @ router.weight.T
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
        choices = scores.topk(2, dim=-1).indices.flatten()
        share = torch.bincount(choices, minlength=8) / len(choices)
        total = total + 8 * (share * probability).sum()
    (0.5 * 0.25 * total).backward()
    assert got is not None
    assert router.weight.grad is not None
    assert got.abs().max() > 1e-4
    torch.testing.assert_close(got, router.weight.grad, rtol=1e-4, atol=1e-6)


def test_even_load_has_auxiliary_loss_one_and_a_collapse_has_more() -> None:
    """E sum f P is 1 where load and scores are even, E / k where two experts take everything."""
    from trainsys.models.router import _row_losses

    cfg = MoEConfig(**BASE)
    even = torch.arange(16).view(1, 8, 2) % 8
    assert _row_losses(torch.full((1, 8, 8), 1 / 8), even, cfg).item() == pytest.approx(1)
    one_sided = torch.zeros(1, 8, 8)
    one_sided[..., :2] = 0.5
    assert _row_losses(one_sided, even % 2, cfg).item() == pytest.approx(4)


def test_load_counts_once_in_training_and_never_in_evaluation() -> None:
    moe = mixture(model(capacity_factor=0.5))
    x = torch.randn(2, 10, 16, requires_grad=True)
    with torch.no_grad():
        moe(x)
    assert not moe.router.load.any()
    kept = moe.router(x).kept
    assert kept is not None
    moe(x).sum().backward()
    assert moe.router.load[:-1].sum() == 2 * 10 * 2
    assert moe.router.load[-1] == (~kept).sum() > 0


@settings(max_examples=50)
@given(
    st.integers(1, 6).flatmap(
        lambda e: st.tuples(st.just(e), st.lists(st.integers(0, e - 1), min_size=4, max_size=24))
    ),
    st.floats(0.1, 3.0),
)
def test_capacity_is_first_come_first_served(case: tuple[int, list[int]], factor: float) -> None:
    n_experts, listed = case
    listed = listed[: len(listed) // 2 * 2]
    choices = torch.tensor(listed).view(1, -1, 2)
    kept = within_capacity(choices, n_experts, factor).flatten().tolist()
    limit = expert_capacity(len(listed) // 2, 2, n_experts, factor)
    seen = [0] * n_experts
    for expert, keep in zip(listed, kept, strict=True):
        assert keep == (seen[expert] < limit)
        seen[expert] += 1


def test_rows_have_their_own_capacity_so_micro_batches_do_not_matter() -> None:
    moe = mixture(model(capacity_factor=0.7))
    x = torch.randn(4, 10, 16)
    torch.testing.assert_close(torch.cat([moe(x[:1]), moe(x[1:])]), moe(x))


def test_dropless_loses_no_token_even_where_all_want_one_expert() -> None:
    moe = mixture(model(top_k=1, norm_topk=False, balance="none"))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[5] = 1.0
    x = torch.rand(2, 10, 16) + 0.1
    routing = moe.router(x)
    assert routing.kept is None
    assert (routing.choices == 5).all()
    assert (moe(x).abs().sum(-1) > 0).all()


def test_groups_limit_where_a_token_goes() -> None:
    """DeepSeek-V3: the two groups with the largest sums of their two best scores."""
    cfg = MoEConfig(**{**BASE, "top_k": 3}, n_groups=4, top_groups=2, score="sigmoid", balance="none")
    router = Router(4, cfg)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([3.0, -9, 1, 1.1, 2, -9, 0.5, 0.9])
    choices = router(torch.tensor([[[1.0, 0, 0, 0]]])).choices
    assert sorted(choices.flatten().tolist()) == [2, 3, 7]
    free = Router(4, cfg.model_copy(update={"n_groups": 1, "top_groups": 1}))
    free.weight = router.weight
    assert sorted(free(torch.tensor([[[1.0, 0, 0, 0]]])).choices.flatten().tolist()) == [0, 3, 4]


def test_router_is_fp32_in_a_bf16_model() -> None:
    router = mixture(model()).router
    x = torch.randn(1, 5, 16).bfloat16()
    assert router(x).gates.dtype == torch.float32
    rounded = router.weight.to(torch.bfloat16).float()
    scores = (x.float() @ rounded.T).softmax(-1).topk(2, dim=-1).values
    torch.testing.assert_close(router(x).gates, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"top_k": 9}, "top_k=9"),
        ({"n_groups": 3}, "n_groups=3"),
        ({"n_groups": 2, "top_groups": 4}, "top_groups=4"),
        ({"n_groups": 8, "top_groups": 1}, "1 experts"),
        ({"balance": "bias", "aux_loss_coef": 0.1}, "aux_loss_coef is for balance=aux_loss"),
        ({"bias_update_rate": 0.1}, "bias_update_rate is for balance=bias"),
    ],
)
def test_refusals(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MoEConfig(**{**BASE, **wrong})


VARIANTS: dict[str, dict[str, Any]] = {
    "routed": {},
    "shared and dense": {"n_shared_experts": 2, "n_dense_layers": 1},
    "wide shared": {"shared_d_ff": 20, "top_k": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_and_parameters_are_those_of_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = model(**VARIANTS[name])
    decoder = Decoder(cfg)
    init_weights(decoder, cfg, seed=0)
    counts = param_counts(cfg)
    sizes = {n: p.numel() for n, p in decoder.named_parameters()}
    assert sum(sizes.values()) == counts.total
    assert sum(n for name, n in sizes.items() if ".experts." in name) == counts.experts
    assert sum(n for name, n in sizes.items() if ".shared." in name) == counts.shared_experts
    assert sum(n for name, n in sizes.items() if ".router." in name) == counts.router
    # torch counts no grouped product; the loop does the same multiplications one by one.
    monkeypatch.setattr(grouped, "_one_kernel", lambda *_: False)
    tokens = torch.randint(40, (2, 6))
    positions = torch.arange(6).expand(2, 6)
    with FlopCounterMode(display=False) as counter:
        decoder(tokens, positions).sum().backward()
    # Nor CPU attention: 0 pairs.
    assert counter.get_total_flops() == batch_flops(cfg, 12, 0).train


def test_on_meta_it_computes_shapes() -> None:
    cfg = model(n_shared_experts=1)
    with torch.device("meta"):
        decoder = Decoder(cfg)
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        assert decoder(tokens, tokens).shape == (2, 9, 40)
