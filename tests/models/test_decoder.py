"""The decoder against a second, plain one in fp64 for every option, and the laws a causal decoder obeys."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models.reference import decoder as reference
from torch import nn

from trainsys.config.model import ModelConfig, RopeConfig
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.ops.documents import Documents

SHAPE = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 24,
    "vocab": 19,
    "init_std": 0.3,
}

OPTIONS = {
    "llama": {},
    "multi-head": {"n_kv_heads": None},
    "multi-query": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 6},
    "tied": {"tied_embeddings": True},
    "gelu": {"ffn_kind": "gelu"},
    "layer norm": {"norm": "layernorm"},
    "qk norm": {"qk_norm": True},
    "qkv bias": {"qkv_bias": True},
    "parallel block": {"parallel_block": True},
    "window": {"sliding_window": 3},
    "window wider than the row": {"sliding_window": 64},
    "norm eps": {"norm_eps": 1e-2},
    "rope theta": {"rope": RopeConfig(theta=100.0)},
    "rope linear": {"rope": RopeConfig(scaling="linear", factor=4.0)},
    "rope llama3": {"rope": RopeConfig(scaling="llama3", factor=8.0, original_seq_len=16)},
    "rope yarn": {"rope": RopeConfig(scaling="yarn", factor=4.0, original_seq_len=16)},
    "all": {
        "tied_embeddings": True,
        "qk_norm": True,
        "qkv_bias": True,
        "parallel_block": True,
        "sliding_window": 4,
        "rope": RopeConfig(scaling="yarn", factor=4.0, original_seq_len=16),
    },
}


def build(dtype=torch.float32, compute_dtype=None, **options) -> Decoder:
    """A small decoder whose every parameter is random, norms and biases too."""
    cfg = ModelConfig(**(SHAPE | options))
    model = Decoder(cfg, compute_dtype or dtype).to(dtype)
    init_weights(model, cfg, seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn(param.shape, generator=g, dtype=dtype) * 0.3)
    return model


def batch(b: int = 2, s: int = 9, vocab: int = 19):
    g = torch.Generator().manual_seed(2)
    return torch.randint(vocab, (b, s), generator=g), torch.arange(s).expand(b, s)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients_are_those_of_the_plain_decoder(options, documents):
    model = build(torch.float64, **options)
    tokens, positions = batch()
    docs = torch.tensor([[0] * 5 + [1] * 4, [3] * 2 + [1] * 7]) if documents else None
    names, params = zip(*model.named_parameters(), strict=True)
    logits = model(tokens, positions, docs)
    want = reference(dict(zip(names, params, strict=True)), model.cfg, tokens, positions, docs)
    torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
    assert want.std() > 0.1, "a model that says nothing proves nothing"
    dy = torch.randn(want.shape, dtype=torch.float64)
    grads, want_grads = (torch.autograd.grad(y, params, dy) for y in (logits, want))
    for name, got, expected in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.abs().max() > 1e-6, f"{name} has no gradient"


def test_parameter_names():
    names = {name for name, _ in build(qkv_bias=True, qk_norm=True, n_layers=1).named_parameters()}
    layer = {
        *(f"attn.{w}.weight" for w in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
        *(f"attn.{w}.bias" for w in ("wq", "wk", "wv")),
        *(f"ffn.{w}.weight" for w in ("w_gate", "w_up", "w_down")),
        "attn_norm.weight",
        "ffn_norm.weight",
    }
    assert names == {"embed.weight", "norm.weight", "head.weight", *(f"layers.0.{n}" for n in layer)}
    gelu = {
        name
        for name, _ in build(tied_embeddings=True, ffn_kind="gelu", parallel_block=True).named_parameters()
    }
    assert not gelu & {"head.weight", "layers.0.ffn.w_gate.weight", "layers.0.ffn_norm.weight"}
    assert not list(build().buffers())


def test_packed_documents_give_what_each_gives_alone():
    model = build()
    tokens, _ = batch(1, 12)
    cuts = (0, 3, 4, 12)
    docs = torch.zeros(1, 12, dtype=torch.int64)
    positions = torch.zeros(1, 12, dtype=torch.int64)
    for n, (a, b) in enumerate(pairwise(cuts)):
        docs[:, a:b], positions[:, a:b] = 7 - n, torch.arange(b - a)
    packed = model(tokens, positions, docs)
    for a, b in pairwise(cuts):
        alone = model(tokens[:, a:b], torch.arange(b - a).unsqueeze(0))
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-5, atol=1e-5)
    counted_on = model(tokens, torch.arange(12).unsqueeze(0), docs)
    torch.testing.assert_close(packed, counted_on, rtol=1e-4, atol=1e-4)  # rotation sees distances only
    assert (model(tokens, positions) - packed).abs().max() > 1e-2


@pytest.mark.parametrize(("window", "layers"), [(None, 2), (3, 1), (3, 2)])
def test_a_token_reaches_exactly_the_tokens_that_may_see_it(window, layers):
    model = build(sliding_window=window, n_layers=layers)
    tokens, positions = batch(1, 12)
    before = model(tokens, positions)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 19
    moved = (model(changed, positions) - before).abs().amax(-1)[0] > 1e-6
    last = 12 if window is None else 4 + layers * (window - 1) + 1
    assert moved.tolist() == [4 <= i < last for i in range(12)]


@pytest.mark.parametrize("options", [{}, {"tied_embeddings": True, "qk_norm": True, "qkv_bias": True}])
def test_bf16_compute_on_fp32_weights(options):
    model, exact = (build(compute_dtype=dtype, **options) for dtype in (torch.bfloat16, torch.float32))
    tokens, positions = batch()
    logits = model(tokens, positions)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())
    want = exact(tokens, positions)
    assert 0 < (logits.float() - want).norm() / want.norm() < 0.02


def test_weights_already_in_bf16_give_the_same_as_fp32_weights_cast_at_use():
    """FSDP hands over bf16 copies, replicated data parallelism does not: no difference to the bit."""
    tokens, positions = batch()
    at_use = build(compute_dtype=torch.bfloat16, qk_norm=True, qkv_bias=True)
    want = at_use(tokens, positions)
    assert torch.equal(at_use.to(torch.bfloat16)(tokens, positions), want)


def test_head_can_be_called_on_parts_of_the_hidden_state():
    for tied in (False, True):
        model = build(tied_embeddings=tied)
        tokens, positions = batch()
        hidden = model.forward_hidden(tokens, positions)
        parts = [model.head_logits(part) for part in hidden.split(4, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, positions))


def test_stages_one_after_another_give_the_whole_model():
    model = build(n_layers=3)
    tokens, positions = batch()
    want = model(tokens, positions)
    stages = [Decoder(model.cfg, layer_ids=ids) for ids in ([0], [], [1, 2])]
    for stage in stages[1:]:
        stage.embed = None
    for stage in stages[:-1]:
        stage.norm = stage.head = None
    x = tokens
    for stage in stages:
        mine = {name: p for name, p in model.state_dict().items() if name in stage.state_dict()}
        stage.load_state_dict(mine)
        x = stage(x, positions)
    assert torch.equal(x, want)
    assert [len(list(s.parameters())) for s in stages] == [10, 0, 20]


def test_heads_are_counted_from_the_weights():
    """What tensor parallelism relies on: half of the heads and of the hidden units, summed, is the whole."""
    model = build(n_layers=1)
    tokens, positions = batch()
    block = model.layers["0"]
    x = block.attn_norm(model.embed(tokens))
    shared = model._shared(positions, None, x.dtype)
    whole = [block.attn(x, shared), block.ffn(x)]
    parts = [torch.zeros_like(y) for y in whole]
    names = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w_gate": 0, "w_up": 0, "w_down": 1}
    full = {n: m.weight for n, m in (*block.attn.named_children(), *block.ffn.named_children()) if n in names}
    for rank in (0, 1):
        for name, dim in names.items():
            owner = block.attn if hasattr(block.attn, name) else block.ffn
            getattr(owner, name).weight = nn.Parameter(full[name].chunk(2, dim)[rank])
        parts[0] += block.attn(x, shared)
        parts[1] += block.ffn(x)
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want)


def test_the_attention_core_can_be_replaced():
    model = build()
    tokens, positions = batch()

    class Core(nn.Module):
        prepared, seen = 0, ()

        def prepare(self, positions, docs):
            Core.prepared += 1
            return "plan"

        def forward(self, q, k, v, prepared):
            self.seen = (q.shape, k.shape, v.shape, prepared)
            return torch.zeros_like(q)

    for layer in model.layers.values():
        layer.attn.core = Core()
    model(tokens, positions)
    assert Core.prepared == 1
    for layer in model.layers.values():
        assert layer.attn.core.seen == ((2, 9, 4, 4), (2, 9, 2, 4), (2, 9, 2, 4), "plan")


def test_built_on_meta_it_takes_no_memory_and_computes_shapes():
    with torch.device("meta"):
        model = Decoder(ModelConfig(**SHAPE))
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        docs = Documents.of(torch.tensor([[0] * 4 + [1] * 5, [0] * 9], device="cpu"))
        logits = model(tokens, tokens, docs)
    assert all(p.is_meta for p in model.parameters())
    assert logits.is_meta
    assert logits.shape == (2, 9, 19)
