"""Megatron's fused rows as ours: every element once, views all the way, whatever flat range is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.engines.megatron.names import Part, Rows, rows_of
from trainsys.engines.megatron.pieces import boxes
from trainsys.models.shards import ShardSpec

MODEL = ModelConfig(
    n_layers=3, d_model=8, n_heads=4, n_kv_heads=2, d_ff=12, vocab=20, qkv_bias=True, qk_norm=True,
    moe=MoEConfig(n_experts=4, top_k=2, d_ff=6, n_shared_experts=1, n_dense_layers=1),
)  # fmt: skip
LAYER = "decoder.layers.1."


def local_shape(name: str, part: Part, model: ModelConfig = MODEL) -> tuple[int, int]:
    """Rows and columns of a parameter, from its places alone."""
    rows = rows_of(name, lambda i: i, model, part)
    columns = rows[0].place.local_shape[-1] if len(rows[0].place.full_shape) > 1 else 1
    return sum(r.count for r in rows), columns


@pytest.mark.parametrize("tp", [1, 2])
def test_queries_keys_and_values_are_found_group_by_group(tp: int) -> None:
    """Megatron's order: for each group its queries, its key, its value."""
    dim, groups = MODEL.dim_per_head, MODEL.kv_heads
    fused = np.concatenate(
        [
            np.concatenate([np.arange(g * 2 * dim, (g + 1) * 2 * dim), 100 + np.arange(g * dim, (g + 1) * dim),
                            200 + np.arange(g * dim, (g + 1) * dim)])
            for g in range(groups)
        ]
    ).astype(np.float32)  # fmt: skip
    found: dict[str, list[float]] = {"wq": [], "wk": [], "wv": []}
    for index in range(tp):
        part = Part(tp, index)
        rows = rows_of(LAYER + "self_attention.linear_qkv.bias", lambda i: i + 1, MODEL, part)
        held = torch.from_numpy(np.split(fused, tp)[index].copy())
        for piece in boxes(held, 0, rows, 1):
            assert piece.name.startswith("layers.2.attn.w")
            assert piece.name.endswith(".bias")
            found[piece.name.split(".")[3]] += piece.data.tolist()
    assert found["wq"] == list(range(4 * dim))
    assert found["wk"] == [100 + i for i in range(2 * dim)]
    assert found["wv"] == [200 + i for i in range(2 * dim)]


def test_the_gate_comes_before_up_and_each_expert_has_its_place_in_the_stack() -> None:
    part = Part(size=2, index=1, first_expert=2)
    rows = rows_of(LAYER + "mlp.experts.local_experts.1.linear_fc1.weight", lambda i: i, MODEL, part)
    place = ShardSpec((4, 6, 8), ((3, 4), (3, 6), (0, 8)))
    assert rows == [
        Rows(0, 3, "layers.1.ffn.experts.w_gate", place),
        Rows(3, 3, "layers.1.ffn.experts.w_up", place),
    ]
    down = rows_of(LAYER + "mlp.experts.local_experts.1.linear_fc2.weight", lambda i: i, MODEL, part)
    assert down == [Rows(0, 8, "layers.1.ffn.experts.w_down", ShardSpec((4, 8, 6), ((3, 4), (0, 8), (3, 6))))]


def test_a_parameter_without_a_rule_is_an_error_and_no_guess() -> None:
    with pytest.raises(AssertionError, match="no rule"):
        rows_of(LAYER + "mlp.something.weight", lambda i: i, MODEL, Part())


NAMES = [
    "embedding.word_embeddings.weight",
    LAYER + "self_attention.linear_qkv.weight",
    LAYER + "self_attention.linear_qkv.bias",
    LAYER + "self_attention.linear_proj.weight",
    LAYER + "self_attention.q_layernorm.weight",
    LAYER + "mlp.linear_fc1.weight",
    LAYER + "mlp.linear_fc2.weight",
    LAYER + "mlp.router.weight",
    LAYER + "mlp.shared_experts.linear_fc1.weight",
    LAYER + "mlp.experts.local_experts.0.linear_fc1.weight",
]


@given(st.sampled_from(NAMES), st.sampled_from([1, 2]), st.data())
def test_any_cuts_of_the_memory_give_each_element_once_in_place(
    name: str, tp: int, data: st.DataObject
) -> None:
    """What the distributed optimizer's shards are filled with is the parameter's memory."""
    part = Part(tp, data.draw(st.integers(0, tp - 1)))
    n_rows, columns = local_shape(name, part)
    memory = torch.zeros(n_rows * columns)
    cuts = sorted(data.draw(st.lists(st.integers(0, memory.numel()), max_size=4)))
    rows = rows_of(name, lambda i: i, MODEL, part)
    whole: dict[str, np.ndarray] = {}
    for start, stop in zip([0, *cuts], [*cuts, memory.numel()], strict=True):
        for piece in boxes(memory[start:stop], start, rows, columns):
            assert tuple(piece.data.shape) == piece.place.local_shape
            full = whole.setdefault(
                piece.name, np.arange(np.prod(piece.place.full_shape)).reshape(piece.place.full_shape)
            )
            box = tuple(slice(a, b) for a, b in piece.place.bounds)
            assert not piece.data.any(), "an element came twice"
            piece.data.copy_(torch.from_numpy(full[box] + 1.0))
    assert bool((memory > 0).all()), "an element did not come at all"
    # One range of everything reads back the same.
    for piece in boxes(memory, 0, rows, columns):
        box = tuple(slice(a, b) for a, b in piece.place.bounds)
        assert np.array_equal(piece.data.numpy(), whole[piece.name][box] + 1.0)
