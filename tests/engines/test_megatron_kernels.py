"""Which of Transformer Engine's and apex's kernels a machine gives Megatron, with each of them there and not there."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainsys.config.run import RunConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="the extra megatron is not installed")
    from trainsys.engines.megatron import build
    from trainsys.engines.megatron.kernels import (
        ACCUMULATION,
        PLAIN,
        TRANSFORMER_ENGINE,
        importable,
        kernels_for,
    )

from trainsys.engines.megatron.names import Part, rows_of
from trainsys.engines.megatron.products import Products, use_transformer_engine
from trainsys.layout import Layout

GPU = torch.device("cuda")
MOE = {"n_experts": 4, "top_k": 2, "d_ff": 32, "n_shared_experts": 1, "n_dense_layers": 1}


def config(**sections: Any) -> RunConfig:
    model = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "vocab": 72, "max_seq_len": 64}
    return RunConfig.model_validate(
        {"engine": "megatron", "train": {"seq_len": 32}, **sections, "model": {**model, **sections.get("model", {})}}
    )


def has(*names: str) -> Any:
    return lambda name: name in names


def test_everything_is_on_where_everything_is_installed() -> None:
    found = kernels_for(config(model={"moe": MOE}), GPU, has(TRANSFORMER_ENGINE, ACCUMULATION))
    assert (found.linears, found.grouped_experts, found.rotary, found.activation, found.accumulation) == (True,) * 5
    assert str(found) == (
        "megatron kernels: Transformer Engine's linears, grouped experts, fused rope, fused swiglu, "
        "fused gradient accumulation"
    )


def test_without_transformer_engine_its_kernels_are_off_and_said_to_be_missing() -> None:
    found = kernels_for(config(model={"moe": MOE}), GPU, has(ACCUMULATION))
    assert (found.linears, found.grouped_experts, found.rotary) == (False, False, False)
    assert (found.activation, found.accumulation) == (True, True)
    said = str(found)
    assert said.startswith("megatron kernels: fused swiglu, fused gradient accumulation; for more: pip install")
    assert "transformer-engine" in said
    assert "apex" not in said
    assert "\n" not in said


def test_without_apex_gradients_are_accumulated_plainly() -> None:
    found = kernels_for(config(), GPU, has(TRANSFORMER_ENGINE))
    assert (found.linears, found.grouped_experts, found.accumulation) == (True, False, False)
    assert "apex" in str(found)
    assert "transformer-engine" not in str(found)


@pytest.mark.parametrize(
    ("sections", "off"),
    [
        ({"data": {"document_mask": True}}, "rotary"),
        ({"model": {"rope": {"scaling": "yarn", "factor": 4.0, "original_seq_len": 8}}}, "rotary"),
        ({"model": {"ffn_kind": "gelu"}}, "activation"),
    ],
)
def test_what_a_kernel_cannot_compute_it_is_not_asked_for(sections: dict[str, Any], off: str) -> None:
    everything = has(TRANSFORMER_ENGINE, ACCUMULATION)
    assert getattr(kernels_for(config(), GPU, everything), off)
    assert not getattr(kernels_for(config(**sections), GPU, everything), off)


def test_neither_on_cpu_nor_when_plain() -> None:
    everything = has(TRANSFORMER_ENGINE, ACCUMULATION)
    assert kernels_for(config(), torch.device("cpu"), everything) == PLAIN
    assert kernels_for(config(megatron={"kernels": "plain"}), GPU, everything) == PLAIN


def test_a_library_that_cannot_be_loaded_is_not_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built_for_another.py").write_text("raise OSError('undefined symbol')\n")
    (tmp_path / "good.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not importable("built_for_another")
    assert not importable("not_there_at_all")
    assert importable("good")


def test_megatron_is_told() -> None:
    """But for fused rope, for which it looks for Transformer Engine at once."""
    cfg = config(model={"moe": MOE})
    kernels = kernels_for(cfg, GPU, has(ACCUMULATION))
    made = build.transformer_config(cfg, Layout(), GPU, kernels)
    assert (made.bias_activation_fusion, made.gradient_accumulation_fusion, made.moe_grouped_gemm) == (True, True, False)
    plain = build.transformer_config(cfg, Layout(), GPU, PLAIN)
    assert (plain.bias_activation_fusion, plain.gradient_accumulation_fusion) == (False, False)
    if not importable(TRANSFORMER_ENGINE):
        with pytest.raises(ValueError, match="apply_rope_fusion"):
            build.transformer_config(cfg, Layout(), GPU, kernels_for(cfg, GPU, has(TRANSFORMER_ENGINE)))


@pytest.mark.parametrize("grouped", [False, True])
def test_every_linear_of_the_layers_is_transformer_engines(grouped: bool) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as local_spec

    block = SimpleNamespace(layer_specs=[local_spec(), local_spec(num_experts=4)])
    names = ("Column", "Row", "ColumnGrouped", "RowGrouped", "GroupedMLP")
    te = Products(*(type(name, (), {}) for name in names))
    use_transformer_engine(block, te, grouped=grouped)
    dense, sparse = (layer.submodules.mlp.submodules for layer in block.layer_specs)
    attention = [layer.submodules.self_attention.submodules for layer in block.layer_specs]
    assert {(a.linear_qkv, a.linear_proj) for a in attention} == {(te.column, te.row)}
    shared = sparse.shared_experts.submodules
    assert {(m.linear_fc1, m.linear_fc2) for m in (dense, shared)} == {(te.column, te.row)}
    experts = sparse.experts
    pair = (experts.submodules.linear_fc1, experts.submodules.linear_fc2)
    assert pair == ((te.column_grouped, te.row_grouped) if grouped else (te.column, te.row))
    assert (experts.module is te.grouped_mlp) == grouped


@pytest.mark.parametrize("linear", ["linear_fc1", "linear_fc2"])
def test_a_grouped_experts_weight_lies_where_that_of_an_expert_alone_does(linear: str) -> None:
    model, part = config(model={"moe": MOE}).model, Part(size=2, index=1, first_expert=2)
    layer = "decoder.layers.1.mlp.experts."
    alone = rows_of(f"{layer}local_experts.1.{linear}.weight", lambda i: i, model, part)
    assert rows_of(f"{layer}{linear}.weight1", lambda i: i, model, part) == alone
    assert rows_of(f"{layer}{linear}.weight0", lambda i: i, model, part) != alone
