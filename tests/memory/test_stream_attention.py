"""Attention in pieces of queries: exact, of any mask, and its input is all that a layer keeps of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.memory import stream_attention
from trainsys.memory.recompute import apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.models.init import init_weights
from trainsys.ops.attention_kernels import kernel_for

B, S, D, H, K, F = 2, 12, 32, 4, 2, 48


def _model(window: int | None = None, dtype: torch.dtype = torch.float32, **streams: int) -> Decoder:
    cfg = ModelConfig(
        n_layers=1, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, vocab=40, max_seq_len=64, qk_norm=True,
        qkv_bias=True, sliding_window=window, init_std=0.3,
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(cfg, compute_dtype=dtype).to(dtype)
    apply_recompute(model, RecomputeConfig(**streams))  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    init_weights(model, cfg, 0)
    return model


def _inputs(docs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 1 + [1] * 9 + [2] * 2]) if docs else None
    return torch.randint(40, (B, S)), torch.arange(S).expand(B, S), ids


@pytest.mark.parametrize("docs", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("queries", [1, 5, 6, 64])
def test_same_logits_and_gradients(queries: int, window: int | None, docs: bool) -> None:
    results = []
    for size in (0, queries):
        model = _model(window, torch.float64, stream_attention=size)
        logits = model(*_inputs(docs))
        logits.square().sum().backward()
        results.append({"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    for name, whole in results[0].items():
        assert whole.abs().max() > 0, name
        assert (results[1][name] - whole).norm() < 1e-12 * whole.norm(), name


def _saved_elements(model: Decoder) -> int:
    """Elements in the distinct storages that forward saves, parameters excluded."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and x.is_floating_point():
            sizes[storage.data_ptr()] = storage.nbytes() // 4
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*_inputs(False))
    return sum(sizes.values())


def test_a_layer_keeps_the_input_of_attention_alone() -> None:
    """Elements a token that streaming saves: queries and keys before and after norm and rotation, values, output and
    log-sum-exp. Both streams: what is left of a layer are its norms' inputs and outputs (see test_saved_bytes)."""
    plain, streamed = (_saved_elements(_model(stream_attention=n)) for n in (0, 4))
    both = _saved_elements(_model(stream_attention=4, stream_ffn=4))
    q, kv = D, D * K // H
    least = q + 2 * kv + q + H
    assert (plain - streamed) / (B * S) >= least
    ends = D + 1 + 2 * D  # the final norm's input, its one number and output; what the embedding hands on
    assert both / (B * S) <= 4 * D + 2 + ends


def test_one_piece_of_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    class Watched:
        def __init__(self, q: Tensor) -> None:
            self.kernel = kernel_for(q)

        def forward(self, q: Tensor, k: Tensor, *rest: object) -> object:
            seen.append(("forward", q.shape[1], k.shape[1]))
            return self.kernel.forward(q, k, *rest)  # type: ignore[arg-type]

        def backward(self, dout: Tensor, q: Tensor, k: Tensor, *rest: object) -> object:
            seen.append(("backward", q.shape[1], k.shape[1]))
            return self.kernel.backward(dout, q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stream_attention, "kernel_for", Watched)
    _model(stream_attention=5)(*_inputs(False)).sum().backward()
    each = [(5, 5), (5, 5), (5, 5), (2, 10), (2, 2)]  # queries, keys: the keys before, then their own
    assert sorted(seen) == sorted(
        [(way, *pair) for way, times in (("forward", 2), ("backward", 1)) for pair in each * times]
    )
    seen.clear()
    _model(window=4, stream_attention=5)(*_inputs(False))
    # 4 keys a query. Of the keys before a piece its first 3 queries see 3, 2 and 1.
    assert sorted((q, k) for _, q, k in seen) == [(2, 2), (2, 3), (3, 3), (5, 5), (5, 5)]
