"""The memory model against hand counts and against what papers print."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support_cases import case

from trainsys.planner.constants import shipped
from trainsys.planner.memory import Memory, in_flight, layer_activation_bytes, peak_memory
from trainsys.planner.memory_constants import MemoryConstants, memory_from_priors, shipped_memory
from trainsys.planner.step_time import step_time

EXACT = MemoryConstants(
    activation=1.0, norm_unfused=0.0, rotary=0.0, gate=0.0, square=5.0, logit_bytes=10.0, overhead_bytes=0.0,
    bucket_bytes=0.0, grad_units=2.0, half_kept=0.35, logit_gathered=18.0, usable=1.0,
)  # fmt: skip
GPT = {
    "d_model": 12288.0, "n_heads": 96.0, "n_kv_heads": 96.0, "d_ff": 49152.0, "glu": 0.0, "seq": 2048.0,
    "attn_params": 4 * 12288.0**2, "attn_kernel": 1.0, "n_layers": 96.0, "vocab": 51200.0, "tied": 1.0,
    "mem_bytes": 80e9, "eager": 0.0, "compiled": 0.0, "zero": 0.0, "fsdp_shard": 1.0, "opt_shard": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("tp", "sp", "rest", "whole"), [(1, 0, 24, 10), (8, 0, 24, 10), (8, 1, 24, 10)])
def test_layer_activations_are_korthikantis(tp: float, sp: float, rest: float, whole: float) -> None:
    """Korthikanti et al. 2022, table 2: s b h (10 + 24/t + 5 a s / (h t)); sequence parallelism splits the 10."""
    c = case(**GPT, tp=tp, sp=sp, micro_batch=1.0)
    s, h, a = 2048.0, 12288.0, 96.0
    expected = s * h * (whole / (tp if sp else 1.0) + rest / tp + 5 * a * s / (h * tp))
    full, entry = layer_activation_bytes(c, EXACT)
    assert float(full) == pytest.approx(expected)
    assert float(entry) == pytest.approx(2 * s * h / (tp if sp else 1.0))


def test_experts_keep_what_goes_in_and_comes_out_of_them() -> None:
    """16 bits a value: a copy's input, gate, up, product (their inner size) and output."""
    d, f = 4096.0, 2048.0
    sizes = [
        float(layer_activation_bytes(case(n_experts=64.0, top_k=k, d_expert=f), EXACT)[0]) for k in (1.0, 3.0)
    ]
    tokens = 8192.0
    assert sizes[1] - sizes[0] == pytest.approx(2 * tokens * 2.0 * (2 * d + 3 * f))


def test_only_an_unfused_gate_keeps_its_activation() -> None:
    kept = replace(EXACT, gate=1.0)
    fused, compiled, plain = (
        float(layer_activation_bytes(case(modern=m, compiled=c), kept)[0]) for m, c in ((1, 0), (0, 1), (0, 0))
    )
    assert fused == compiled
    assert plain - fused == pytest.approx(8192.0 * 2.0 * 14336.0)


def test_dense_layers_come_first_so_the_last_stage_has_most_experts() -> None:
    """Four layers on two stages, one of them dense: a stage of two mixtures is the fullest and the slowest."""
    moe = {
        "n_experts": 64.0, "top_k": 2.0, "d_expert": 14336.0, "ep": 8.0, "dp": 32.0, "pp": 2.0, "zero": 1.0,
        "fsdp_shard": 1.0, "opt_shard": 32.0, "compiled": 1.0, "eager": 0.0,
    }  # fmt: skip
    found = peak_memory(case(**moe, n_layers=4.0, dense_layers=1.0), EXACT)
    expert = 3 * 4096.0 * 14336.0
    shared = 4096.0 * 128 * 80 + 2 * 4096 + 4096 * 64
    assert float(found.parameters) == pytest.approx(2 * (2 * (8 * expert + shared) + 128256 * 4096.0))
    slowest = [step_time(case(**moe, n_layers=4.0, dense_layers=n), shipped()).matmul for n in (1.0, 0.0)]
    assert slowest[0] == slowest[1]


def test_states_of_mixed_precision_adam_are_16_to_18_bytes() -> None:
    c = case(**GPT, micro_batch=1.0, grad_bytes=4.0)
    m = peak_memory(c, EXACT)
    n = 96 * (4 * 12288**2 + 2 * 12288 * 49152 + 2 * 12288) + 51200 * 12288
    assert float(m.parameters + m.gradients + m.optimizer) == pytest.approx(18.0 * n, rel=1e-3)


def test_sharding_divides_the_states() -> None:
    states = []
    for zero in (0.0, 1.0, 2.0, 3.0):
        m = peak_memory(case(zero=zero, fsdp_shard=64.0 if zero == 3 else 1.0), EXACT)
        states.append(float(m.parameters + m.gradients + m.optimizer))
    assert states == sorted(states, reverse=True)
    assert states[1] < 0.45 * states[0]


def test_parts_sum_and_are_not_negative() -> None:
    c = case(pp=[1, 2, 8], dp=[64, 32, 8], zero=[3, 1, 1], recompute=[0, 2, 0])
    for m in (memory_from_priors(), shipped_memory()):
        found = peak_memory(c, m)
        parts = [np.asarray(getattr(found, f)) for f in Memory.__dataclass_fields__ if f != "total"]
        np.testing.assert_allclose(sum(parts), found.total)
        assert all((p >= 0).all() for p in parts)


def test_in_flight_by_schedule() -> None:
    front = np.zeros(())
    base = {"pp": 4.0, "global_batch": 1024.0, "dp": 16.0}
    assert float(in_flight(case(**base), front)) == 4
    assert float(in_flight(case(**base), np.asarray(3.0))) == 1
    assert float(in_flight(case(**base, schedule=1.0), front)) == 64
    # Interleaved: (2(p-1) + (v-1)p + 1)/v stages of 1/v of the layers: 1 + (p-1)/(pv) more than 1F1B.
    assert float(in_flight(case(**base, schedule=2.0, vpp=2.0), front)) == pytest.approx(5.5)
    assert float(in_flight(case(**base, schedule=4.0), front)) == 7


def test_recompute_sequence_parallelism_and_smaller_batches_save() -> None:
    m = shipped_memory()

    def acts(**changes: float) -> float:
        return float(peak_memory(case(**changes), m).activations)

    assert acts(recompute=2.0) < acts(recompute=3.0) < acts()
    assert acts(micro_batch=2.0) == pytest.approx(2 * acts(), rel=0.01)
    assert acts(tp=8.0, sp=1.0) < 0.5 * acts(tp=8.0)
    assert acts(cp=4.0) == pytest.approx(acts() / 4, rel=0.01)


def test_published_layouts_that_ran_and_that_did_not() -> None:
    """torchtitan's A100 table: Llama-2 70B over 64, batch 2: full recomputation ran, selective ran out of memory."""
    llama = {
        "n_layers": 80.0, "d_model": 8192.0, "n_heads": 64.0, "d_ff": 28672.0, "vocab": 32000.0, "seq": 4096.0,
        "attn_params": 8192.0 * 128 * (128 + 16), "micro_batch": 2.0, "arch": 1.0, "attn_kernel": 3.0,
        "fused_norm": 0.0, "compiled": 0.0, "mem_bytes": 79.2 * 2**30,
    }  # fmt: skip
    m = shipped_memory()
    ran, lost = case(**llama, recompute=2.0), case(**llama, recompute=3.0)
    assert peak_memory(ran, m).fits(ran, m)
    assert not peak_memory(lost, m).fits(lost, m)
