"""Tables as they come: odd cells, missing columns, unknown machines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.planner.constants import shipped
from trainsys.planner.fill import fill
from trainsys.planner.from_runs import build, case_of
from trainsys.planner.machine import device_named, network_from_text
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.runs_csv import Refusal, parse, read
from trainsys.planner.stacks import stack_of
from trainsys.planner.step_time import step_time

ROW = {
    "row_id": "1", "source": "me", "model_name": "m", "n_layers": "32.0", "d_model": "4096", "n_heads": "32",
    "n_kv_heads": "8", "head_dim": "128", "d_ff": "14336", "ffn_kind": "swiglu", "vocab": "128256",
    "tied_emb": "False", "seq_len": "8192", "n_params": "8.03e9", "gpu": "H100-SXM", "n_gpus": "64",
    "gpus_per_node": "8", "interconnect": "NVLink4 900GB/s; IB NDR 400G", "dtype": "bf16", "dp": "32", "tp": "2",
    "pp": "1", "cp": "1", "ep": "1", "zero_stage": "1", "fsdp": "0", "sp": "True", "micro_batch": "1",
    "global_batch": "256", "recompute": "none", "attention_kernel": "flash2", "step_time_s": "4.0", "oom": "False",
}  # fmt: skip


def row(**changes: str) -> dict[str, str | None]:
    return {**ROW, **changes}


@pytest.mark.parametrize(("text", "name"), [
    ("H100-SXM", "H100-SXM-80"),
    ("A100-80", "A100-SXM-80"),
    ("V100-16", "V100-SXM2-16"),
    ("NVIDIA A100-SXM4-80GB", "A100-SXM-80"),
    ("GB300", "GB300-NVL72"),
    ("H100-96-HBM2e", "H100-SXM-96-HBM2e"),
    ("mi300x", "MI300X"),
    ("H200", "H200-SXM"),
])  # fmt: skip
def test_gpu_names_as_people_write_them(text: str, name: str) -> None:
    assert device_named(text).name == name


@pytest.mark.parametrize(("text", "per_node", "gb_s"), [
    ("NVLink3; 4x OmniPath 100Gb/s per node (JeanZay)", 8, 6.25),
    ("NVLink2; 4x OmniPath 100Gb/s per node", 4, 12.5),
    ("NVLink3 600GB/s/GPU; IB HDR 200Gb/s per GPU (DGX A100)", 8, 25.0),
    ("NVLink; RoCE 1600Gb/s per node", 8, 25.0),
    ("NVLink2; IB 100Gb/s per node", 8, 1.5625),
    ("NVLink3 600GB/s; 8x HDR IB 200Gb/s (Selene)", 8, 25.0),
    ("NVLink5 1.8TB/s; IB 800G", 8, 100.0),
    ("EFA 3200Gbps per node", 8, 50.0),
    ("NVLink3; RoCE (bandwidth not stated)", 8, None),
    ("Selene", 8, None),
    ("", 8, None),
])  # fmt: skip
def test_network_out_of_prose(text: str, per_node: int, gb_s: float | None) -> None:
    assert network_from_text(text, per_node) == gb_s


def test_step_time_from_throughput_and_never_from_an_oom_row() -> None:
    (run,) = parse([row(step_time_s="", tokens_per_s_per_gpu="1,000")])
    assert run.step_s == pytest.approx(256 * 8192 / (1000 * 64))
    (lost,) = parse([row(oom="True")])
    assert math.isnan(lost.step_s)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"n_layers": ""}, "no n_layers"),
    ({"gpu": "Cerebras WSE"}, "unknown GPU"),
    ({"quality": "layout_unknown"}, "layout unknown"),
    ({"tp": "4"}, "is not n_gpus"),
    ({"global_batch": "nan"}, "no global_batch"),
    ({"dp": "", "tp": ""}, "two of tp, pp, dp"),
    ({"cp": "0"}, "cp = 0 is no number of ranks"),
    ({"tp": "0"}, "tp = 0 is no number of ranks"),
    ({"dtype": "fp8", "gpu": "A100-80"}, "no fp8"),
])  # fmt: skip
def test_refusals_give_the_reason(changes: dict[str, str], reason: str) -> None:
    (run,) = parse([row(**changes)])
    found = case_of(run)
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_defaults_for_what_a_row_leaves_out() -> None:
    (run,) = parse([row(dp="", n_kv_heads="", head_dim="", zero_stage="", vpp="", gpus_per_node="")])
    found = case_of(run)
    assert isinstance(found, dict)
    assert (found["dp"], found["n_kv_heads"], found["head_dim"], found["zero"], found["vpp"]) == (
        32,
        32,
        128,
        1,
        1,
    )


def test_a_hybrid_of_unsaid_groups_shards_as_far_as_memory_asks() -> None:
    """The fastest group size that fits, which beats sharding over all ranks; never one that does not fit."""
    hybrid = {"zero_stage": "3", "fsdp": "1", "tp": "1", "dp": "512", "n_gpus": "512", "global_batch": "1024"}
    hybrid["recompute"] = "full"
    big = {"n_layers": "80", "d_model": "8192", "n_heads": "64", "d_ff": "28672", "n_params": "70e9"}
    runs = parse([row(**hybrid, **big, flags=f) for f in ("maxtext FSDP+DP", "maxtext FSDP", "HSDP")])
    cases, kept, _ = build(runs)
    assert cases is not None
    k, m = shipped(), shipped_memory()
    filled = fill(cases, kept, k, m)
    assert filled.fsdp_shard[1] == 512
    assert filled.fsdp_shard[0] == filled.fsdp_shard[2] < 512
    assert peak_memory(filled, m).fits(filled, m)[0]
    seconds = step_time(filled, k).total
    assert seconds[0] < seconds[1]
    node = filled.replace(fsdp_shard=8.0)
    assert step_time(node, k).total[0] < seconds[0], "faster still, but"
    assert not peak_memory(node, m).fits(node, m)[0]


def test_what_flags_say_of_experts_and_of_fp8() -> None:
    assert case_of(parse([row(flags="capacity_factor=1 token drop")])[0])["dropped"] == 1.0
    assert case_of(parse([row()])[0])["dropped"] == 0.0
    fp8 = [case_of(parse([row(dtype="fp8", flags=f)])[0])["fp8"] for f in ("", "FP8-MX", "maxtext (JAX)", "rowwise")]
    assert fp8 == [1.0, 2.0, 3.0, 3.0]


def test_the_source_name_and_the_measurements_change_nothing() -> None:
    (a, b) = parse([row(), row(source="aleph-alpha", step_time_s="9", mfu="0.1", peak_mem_gb="3")])
    assert case_of(a) == case_of(b)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(ROW)), st.text(max_size=12), max_size=8))
def test_any_damage_is_a_case_or_a_refusal(damage: dict[str, str]) -> None:
    cases, kept, refused = build(parse([row(**damage)]))
    assert len(kept) + len(refused) == 1
    assert (cases is None) == (len(kept) == 0)


def test_read_refuses_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column d_model"):
        read(other)


@pytest.mark.parametrize(("says", "name", "recent"), [
    ({"gpu": "A100-80"}, "deepspeed-pipeline", False),
    ({"gpu": "H100-SXM"}, "megatron-lm", True),
    ({"gpu": "H100-SXM", "dtype": "fp8"}, "megatron", True),
    ({"gpu": "H800", "schedule": "DualPipe"}, "megatron", True),
    ({"gpu": "H100-SXM", "attention_kernel": "TE/cudnn"}, "megatron", True),
    ({"gpu": "A100-80", "attention_kernel": "sdpa_flash2"}, "torchtitan", False),
    ({"gpu": "H100-SXM", "fsdp": "1"}, "fsdp", True),
    ({"gpu": "A100-80", "ffn_kind": "gelu", "zero_stage": "0"}, "megatron-classic", False),
])  # fmt: skip
def test_software_from_what_a_row_says(says: dict[str, str], name: str, recent: bool) -> None:
    (run,) = parse([row(**says)])
    assert stack_of(run, recent).name == name


def test_deepseek_hides_its_exchange_and_keeps_to_groups() -> None:
    moe = {"moe_n_experts": "256", "moe_top_k": "8", "moe_d_ff": "2048", "ep": "32", "tp": "1", "dp": "64"}
    (v3,) = parse([row(**moe, model_name="deepseek-v3", schedule="dualpipe")])
    (other,) = parse([row(**moe, model_name="kimi-k2")])
    v3_case, other_case = case_of(v3), case_of(other)
    assert isinstance(v3_case, dict)
    assert isinstance(other_case, dict)
    assert (v3_case["groups"], v3_case["top_groups"], v3_case["ep_overlap"]) == (8.0, 4.0, 1.0)
    assert (other_case["groups"], other_case["top_groups"], other_case["ep_overlap"]) == (1.0, 1.0, 0.0)
    (said,) = parse([row(**moe, flags="moe_a2a_overlap=true")])
    said_case = case_of(said)
    assert isinstance(said_case, dict)
    assert said_case["ep_overlap"] == 1.0
