"""FLOPs against torch's counter, against masks counted one by one, and against published figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainsys.config.loader import load_run
from trainsys.config.model import ModelConfig, MoEConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops import (
    StepWork,
    batch_flops,
    causal_pairs,
    full_pairs,
    head_gemm,
    layer_gemms,
    layer_is_recomputed,
    layer_params,
    mfu,
    packed_pairs,
    param_counts,
    row_pairs,
    step_flops,
    token_flops,
    train_flops_per_token,
)
from trainsys.flops.report import by_convention, run_cli
from trainsys.memory.recompute import apply_recompute
from trainsys.models.decoder import Decoder
from trainsys.ops.attention_rule import Block, Rule
from trainsys.ops.documents import Documents

TINY: dict[str, Any] = {
    "n_layers": 3, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40, "vocab": 50
}  # fmt: skip
VARIANTS = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "mqa": {"n_kv_heads": 1},
    "gelu": {"ffn_kind": "gelu"},
    "tied": {"tied_embeddings": True},
    "bias_qk_norm": {"qkv_bias": True, "qk_norm": True},
    "parallel_layernorm": {"parallel_block": True, "norm": "layernorm"},
    "wide_heads": {"head_dim": 16},
    "window": {"sliding_window": 5},
}
LLAMA3_8B = ModelConfig(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, vocab=128256)
PALM_540B = ModelConfig(
    n_layers=118, d_model=18432, n_heads=48, n_kv_heads=1, head_dim=256, d_ff=73728, vocab=256000,
    tied_embeddings=True, parallel_block=True, norm="layernorm",
)  # fmt: skip
BATCH, SEQ = 2, 12
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 1,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 2,
}
"""Which torch has no formula for: how often it makes the two products of full squares, and where its queries are."""


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | changes))


def counted(model: ModelConfig, recompute: RecomputeConfig | None = None, flash: bool = True) -> tuple[int, int]:
    """What torch counts, forward and forward + backward; on meta, attention is matmuls of full squares, or flash."""
    with torch.device("meta"):
        decoder = Decoder(model)
        tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        positions = torch.arange(SEQ).expand(BATCH, SEQ)
    if recompute is not None:
        apply_recompute(decoder, recompute)
    with Counter(flash) as counter:
        logits = decoder(tokens, positions)
        forward = counter.flops
        logits.sum().backward()
    return forward, counter.flops


class Counter(TorchDispatchMode):
    """Torch's formulas without FlopCounterMode's tracking of modules, which cannot follow a backward that calls them."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.flops, self._flash = 0, FLASH if flash else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif times := self._flash.get(func._overloadpacket):
            q, k = args[times - 1], args[times]
            self.flops += 4 * times * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return out


@pytest.mark.parametrize("name", VARIANTS)
def test_matmuls_are_those_torch_counts(name: str) -> None:
    model = tiny(**VARIANTS[name])
    ours = batch_flops(model, BATCH * SEQ, BATCH * full_pairs(SEQ))
    forward, total = counted(model)
    assert ours.forward == forward
    assert ours.train == total


@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(policy="none"),
        RecomputeConfig(policy="full"),
        RecomputeConfig(policy="every_n", every_n=2),
        RecomputeConfig(policy="every_n", every_n=3),
        RecomputeConfig(stream_ffn=2),
        RecomputeConfig(stream_ffn=2, policy="full"),
        RecomputeConfig(stream_ffn=2, policy="every_n", every_n=2),
    ],
    ids=lambda r: f"{r.policy}{r.every_n}{'s' * (r.stream_ffn > 0)}",
)
def test_recomputation_is_what_the_engine_repeats(recompute: RecomputeConfig) -> None:
    model = tiny()
    ours = batch_flops(model, BATCH * SEQ, BATCH * full_pairs(SEQ), recompute)
    assert ours.hardware == counted(model, recompute)[1]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_streamed_attention_repeats_its_products(policy: Any) -> None:
    """Its kernel, called by name, is not among the operations that torch counts: all but attention's own products."""
    recompute = RecomputeConfig(stream_attention=2, policy=policy)
    model = tiny()
    assert batch_flops(model, BATCH * SEQ, 0, recompute).hardware == counted(model, recompute, flash=False)[1]
    once = batch_flops(model, BATCH * SEQ, BATCH * full_pairs(SEQ), RecomputeConfig(policy=policy))
    streamed = batch_flops(model, BATCH * SEQ, BATCH * full_pairs(SEQ), recompute)
    assert streamed.recomputed - once.recomputed > once.attn_scores + once.attn_values > 0


def test_recompute_policies_by_component() -> None:
    model = tiny()
    plain = batch_flops(model, 24, 156)
    layers = plain.forward - plain.head
    w_down = 3 * 24 * layer_gemms(model)[-1].flops_per_token

    def recomputed(policy: Any, early_stop: bool = True) -> float:
        flops = batch_flops(model, 24, 156, RecomputeConfig(policy=policy, every_n=2), early_stop=early_stop)
        assert flops.train == plain.train
        return flops.hardware - flops.train

    assert recomputed("none") == 0
    assert recomputed("selective") == plain.attn_scores + plain.attn_values > 0
    assert recomputed("full", early_stop=False) == layers
    assert recomputed("full") == layers - w_down
    assert recomputed("every_n", early_stop=False) == layers * 2 / 3
    assert [layer_is_recomputed(RecomputeConfig(policy="every_n", every_n=2), i) for i in range(3)] == [
        True, False, True,
    ]  # fmt: skip


def test_a_routed_layer_is_repeated_whole() -> None:
    model = tiny(moe=MoEConfig(n_experts=4, top_k=2, d_ff=16))
    flops = batch_flops(model, 24, 156, RecomputeConfig(policy="full"))
    assert flops.recomputed == flops.forward - flops.head


def test_moe_components_by_hand() -> None:
    moe = MoEConfig(n_experts=8, top_k=2, d_ff=16, n_shared_experts=1, shared_d_ff=20, n_dense_layers=1)
    flops = batch_flops(tiny(moe=moe), 7, 0)
    assert flops.ffn == 7 * 2 * 3 * 24 * 40  # one leading dense layer
    assert flops.experts == 2 * 7 * 2 * (2 * 3 * 24 * 16)  # two layers, two experts a token
    assert flops.shared_experts == 2 * 7 * 2 * 3 * 24 * 20
    assert flops.router == 2 * 7 * 2 * 24 * 8
    assert flops.head == 7 * 2 * 24 * 50
    assert flops.attn_scores == flops.attn_values == 0
    counts = param_counts(tiny(moe=moe))
    assert counts.experts == 2 * 8 * 3 * 24 * 16
    assert counts.total - counts.active == 2 * 6 * 3 * 24 * 16
    assert counts.router == 2 * 24 * 8
    assert counts.shared_experts == 2 * 3 * 24 * 20


def test_attention_costs_what_a_pair_costs() -> None:
    model = tiny()
    one, two = batch_flops(model, 5, 1), batch_flops(model, 5, 2)
    assert two.attn_scores - one.attn_scores == 3 * 2 * 4 * 8  # layers, multiply-add, heads, head_dim
    assert two.attn_values == two.attn_scores
    assert two.qkv == one.qkv == 3 * 5 * 2 * 24 * (4 + 2 + 2) * 8


def _pairs(seq_len: int, rule: Rule) -> int:
    return int(Block(rule, range(seq_len), range(seq_len)).mask(torch.device("cpu")).sum())


@settings(deadline=None)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_are_the_ones_of_the_mask(seq_len: int, window: int | None) -> None:
    assert causal_pairs(seq_len, window) == _pairs(seq_len, Rule(window))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 8)))
def test_packed_pairs_are_the_ones_of_the_mask(lengths: list[int], window: int | None) -> None:
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    assert packed_pairs(lengths, window) == _pairs(docs.shape[1], Rule(window, Documents.of(docs)))


@settings(deadline=None)
@given(st.integers(1, 60), st.none() | st.integers(1, 50), st.none() | st.integers(1, 70))
def test_a_row_of_equal_documents_is_packed_of_them(seq: int, window: int | None, document: int | None) -> None:
    length = document or seq
    lengths = [min(length, seq - at) for at in range(0, seq, length)]
    assert row_pairs(seq, window, document) == packed_pairs(lengths, window)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = tiny(**VARIANTS[name])
    with torch.device("meta"):
        decoder = Decoder(model)
    counts = param_counts(model)
    assert counts.total == sum(p.numel() for p in decoder.parameters())
    assert counts.active == counts.total
    assert layer_params(model, 1).total == sum(p.numel() for p in decoder.layers["1"].parameters())
    by_part = {"embedding": 0, "attention": 0, "ffn": 0, "norms": 0, "head": 0}
    for parameter, value in decoder.named_parameters():
        parts = ("norm", "embed", "head", "attn", "ffn")
        part = next(p for p in parts if p in parameter)
        part = {"norm": "norms", "embed": "embedding", "attn": "attention"}.get(part, part)
        by_part[part] += value.numel()
    assert by_part == {part: getattr(counts, part) for part in by_part}


def test_gemms_have_the_shapes_of_the_weights() -> None:
    model = tiny(moe=None)
    with torch.device("meta"):
        block = Decoder(model).layers["0"]
    weights = {name.split(".")[-2]: p.shape for name, p in block.named_parameters() if p.ndim == 2}
    assert {g.name: (g.n, g.k) for g in layer_gemms(model)} == {n: tuple(s) for n, s in weights.items()}
    assert {g.name: g.tp_dim for g in layer_gemms(model)} == {
        "wq": "n", "wk": "n", "wv": "n", "wo": "k", "w_gate": "n", "w_up": "n", "w_down": "k",
    }  # fmt: skip
    assert (head_gemm(model).n, head_gemm(model).k) == (50, 24)
    with pytest.raises(IndexError):
        layer_gemms(model, 3)


def test_published_parameter_counts() -> None:
    assert param_counts(LLAMA3_8B).total == 8_030_261_248  # the checkpoint's
    # Chowdhery et al. 2022, table 1.
    assert param_counts(PALM_540B).total == pytest.approx(540.35e9, rel=1e-4)
    mixtral = ModelConfig(
        n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, vocab=32000,
        moe=MoEConfig(n_experts=8, top_k=2, d_ff=14336),
    )  # fmt: skip
    counts = param_counts(mixtral)
    assert counts.total == pytest.approx(46.7e9, rel=1e-3)  # Jiang et al. 2024: 47B, 13B active
    assert counts.active == pytest.approx(12.9e9, rel=2e-3)


def test_causality_is_worth_an_eighth_at_8k_and_70_percent_at_128k() -> None:
    for seq_len, ratio in ((8192, 1.125), (131072, 1.696)):
        full = train_flops_per_token(LLAMA3_8B, seq_len, "noncausal")
        assert full / train_flops_per_token(LLAMA3_8B, seq_len) == pytest.approx(ratio, abs=1e-3)


def test_palm_is_the_published_46_percent() -> None:
    # Chowdhery et al. 2022: 238.3K tokens/s on 6144 TPU v4 of 275 TFLOP/s: 46.2%; 45.7% without attention.
    flops = train_flops_per_token(PALM_540B, 2048, "palm")
    assert mfu(238.3e3 * flops, 1.0, 6144 * 275e12) == pytest.approx(0.462, abs=5e-4)
    no_attention = 6 * param_counts(PALM_540B).total
    assert mfu(238.3e3 * no_attention, 1.0, 6144 * 275e12) == pytest.approx(0.457, abs=5e-4)


def test_palm_counts_no_untied_input_embedding() -> None:
    tied, untied = tiny(tied_embeddings=True), tiny()
    assert train_flops_per_token(tied, 16, "palm") == train_flops_per_token(untied, 16, "palm")
    assert train_flops_per_token(untied, 16, "palm") == (
        6 * (param_counts(untied).total - 50 * 24) + 12 * 3 * 4 * 8 * 16
    )
    moe = tiny(moe=MoEConfig(n_experts=8, top_k=2, d_ff=16))
    assert train_flops_per_token(moe, 16, "palm") == (
        6 * (param_counts(moe).active - 50 * 24) + 12 * 3 * 4 * 8 * 16
    )


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(24, 2304, 24), (96, 12288, 96)])
def test_megatron_is_equation_3_of_narayanan_2021(layers: int, hidden: int, heads: int) -> None:
    s, v = 2048, 51200
    gpt = ModelConfig(
        n_layers=layers, d_model=hidden, n_heads=heads, d_ff=4 * hidden, ffn_kind="gelu", vocab=v
    )
    equation = 96 * layers * hidden**2 * (1 + s / (6 * hidden) + v / (16 * layers * hidden))
    assert train_flops_per_token(gpt, s, "megatron") == pytest.approx(equation, rel=1e-12)
    korthikanti = 72 * layers * hidden**2 * (1 + s / (6 * hidden) + v / (12 * layers * hidden))
    assert train_flops_per_token(gpt, s, "noncausal") == pytest.approx(korthikanti, rel=1e-12)


def test_token_flops_are_a_batch_divided_by_its_tokens() -> None:
    model = tiny(sliding_window=5)
    recompute = RecomputeConfig(policy="selective")
    token = token_flops(model, SEQ, recompute)
    batch = batch_flops(model, SEQ, causal_pairs(SEQ, 5), recompute)
    assert token.hardware * SEQ == pytest.approx(batch.hardware)
    assert token.head * SEQ == pytest.approx(batch.head)
    full = token_flops(model, SEQ, causal=False)
    assert full.attn_scores * SEQ == pytest.approx(batch_flops(model, SEQ, SEQ * SEQ).attn_scores)


def test_padding_moves_hfu_alone() -> None:
    model = tiny()
    plain = step_flops(model, StepWork(tokens=24, attn_pairs=156, seq_len=12))
    padded = step_flops(model, StepWork(24, 156, 12, computed_tokens=36, computed_attn_pairs=234))
    assert (plain.model, plain.palm) == (padded.model, padded.palm)
    assert plain.hardware == plain.model
    assert padded.hardware == plain.hardware * 1.5
    recomputed = step_flops(model, StepWork(24, 156, 12), RecomputeConfig(policy="full"))
    assert recomputed.model == plain.model < recomputed.hardware
    assert plain.palm == 24 * train_flops_per_token(model, 12, "palm")


def test_mfu_is_none_where_the_peak_is_unknown() -> None:
    assert mfu(1e12, 0.5, None) is None
    assert mfu(1e12, 0.5, 4e12) == 0.5


def _published() -> list[dict[str, str]]:
    path = Path(__file__).resolve().parents[1] / "../shared/data/published_runs/runs.csv"
    if not path.exists():
        pytest.skip("the published runs are not beside this checkout")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_runs_recomputed_by_others() -> None:
    """Every distinct shape of the published runs, counted independently when that table was made."""
    errors: dict[str, float] = {}
    needed = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab", "seq_len")
    routed = {"n_experts": "moe_n_experts", "top_k": "moe_top_k", "d_ff": "moe_d_ff"}
    optional = {"shared_d_ff": "moe_shared_d_ff", "n_dense_layers": "moe_dense_layers"}

    def whole(row: dict[str, str], columns: dict[str, str]) -> dict[str, int]:
        return {field: int(float(row[c] or 0)) for field, c in columns.items()}

    for row in _published():
        n = whole(row, {c: c for c in needed})
        complete = all(n.values()) and row["flops_per_token_causal"] and n["head_dim"] % 2 == 0
        # Their latent attention has other projections than ours.
        latent_attention = any(family in row["model_name"].lower() for family in ("deepseek", "kimi"))
        if not complete or latent_attention or row["ffn_kind"] not in ("swiglu", "gelu"):
            continue
        moe = whole(row, routed | optional) if row["moe_n_experts"] else None
        key = repr((n, row["ffn_kind"], moe))
        if key in errors:
            continue
        seq_len = n.pop("seq_len")
        model = ModelConfig(**n, ffn_kind=row["ffn_kind"], moe=None if moe is None else MoEConfig(**moe))
        full = train_flops_per_token(model, seq_len, "noncausal")
        causal = train_flops_per_token(model, seq_len)
        errors[key] = max(
            abs(full / float(row["flops_per_token_noncausal"]) - 1),
            # The table halves the square, without the diagonal: a difference of one token in seq_len.
            abs(causal / float(row["flops_per_token_causal"]) - 1),
        )
    assert len(errors) > 20
    assert max(errors.values()) < 1e-3, sorted(errors.items(), key=lambda e: -e[1])[:3]


def test_the_table_of_conventions_in_the_docs() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/mfu.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[1].replace(",", "").isdigit()]
    assert len(rows) >= 5
    for name, sequence, exact, *ratios in rows:
        seq_len = int(sequence.replace(",", ""))
        length = [f"model.max_seq_len={seq_len}", f"train.seq_len={seq_len}"]
        model = load_run(f"models/{name}", length).model
        flops = by_convention(model, seq_len, RecomputeConfig(policy="full"))
        assert f"{flops['exact'] / 1e9:.4g}" == exact
        others = ("noncausal", "palm", "megatron", "hardware")
        assert [f"{flops[other] / flops['exact']:.3f}" for other in others] == ratios


def test_the_command_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.seq_len=128", "recompute.policy=full"]
    run_cli("models/tiny", overrides, as_json=True)
    out = json.loads(capsys.readouterr().out)
    assert 3 * sum(out["forward"].values()) == pytest.approx(out["train"]["exact"])
    model = load_run("models/tiny").model
    assert out["train"]["hardware"] == token_flops(model, 128, RecomputeConfig(policy="full")).hardware
    assert out["params"]["total"] == param_counts(model).total
    run_cli("models/tiny", overrides)
    shown = capsys.readouterr().out
    assert f"{param_counts(model).total:,} parameters" in shown
    assert f"{out['train']['palm'] / 1e6:,.2f}" in shown
    assert "hardware (recompute full)" in shown
