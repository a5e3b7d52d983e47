"""Laws of the time model: what must grow, what must sum, what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
from support_cases import case

from trainsys.planner.cases import ARCHS
from trainsys.planner.constants import Constants, from_priors, shipped
from trainsys.planner.partition import stages, total_params
from trainsys.planner.step_time import StepTime, step_time

K = shipped()


def seconds(**changes: float | list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return step_time(case(**changes), K).total


@pytest.mark.parametrize("k", [from_priors(), shipped()], ids=["priors", "shipped"])
def test_parts_sum_to_the_step(k: Constants) -> None:
    c = case(
        pp=[1, 4, 4],
        dp=[64, 16, 4],
        tp=[1, 1, 4],
        zero=[3, 1, 1],
        fsdp_shard=[64, 1, 1],
        opt_shard=[64, 16, 4],
    )
    t = step_time(c, k)
    parts = sum(np.asarray(getattr(t, f)) for f in StepTime.__dataclass_fields__ if f != "total")
    np.testing.assert_allclose(parts, t.total, rtol=1e-9)
    assert (np.asarray(t.bubble) >= 0).all()


def test_llama3_8b_on_64_h100_is_plausible() -> None:
    """torchtitan and NeMo publish 35 to 60% of 989 TFLOP/s for this model."""
    flops = 6 * 8.03e9 + 6 * 32 * 4096 * 8192
    mfu = flops * 128 * 8192 / (float(seconds()) * 64 * 989.4e12)
    assert 0.33 < mfu < 0.62


def test_more_work_takes_longer() -> None:
    assert np.all(np.diff(seconds(global_batch=[64, 128, 256, 1024])) > 0)
    assert np.all(np.diff(seconds(n_layers=[16, 32, 64])) > 0)
    assert seconds(recompute=2.0) > seconds()
    assert seconds(seq=16384.0, global_batch=64.0) > seconds()


def test_slower_parts_never_help() -> None:
    fast = seconds(tp=8.0, dp=8.0, zero=1.0, fsdp_shard=1.0, opt_shard=8.0)
    for change in (
        {"link_bw": 150e9, "pair_bw": 150e9},
        {"nic_bw": 50e9},
        {"hbm_bw": 1e12},
        {"gemm_rate_16": 3e14},
    ):
        assert seconds(tp=8.0, dp=8.0, zero=1.0, fsdp_shard=1.0, opt_shard=8.0, **change) > fast, change


def test_slow_network_shows_in_fsdp_only_where_it_crosses_nodes() -> None:
    assert seconds(nic_bw=20e9) > 1.5 * seconds()
    one_node = {"world": 8.0, "dp": 8.0, "fsdp_shard": 8.0, "opt_shard": 8.0, "global_batch": 16.0}
    assert seconds(nic_bw=20e9, **one_node) == pytest.approx(float(seconds(**one_node)))


def test_bubble_by_schedule_follows_the_papers() -> None:
    """Fill and drain pass the other stages once; interleaving divides, zero bubble fills with weight gradients."""
    base = {"pp": 8.0, "dp": 8.0, "zero": 1.0, "fsdp_shard": 1.0, "opt_shard": 8.0, "vocab": 1000.0}
    plain = step_time(case(**base), K)
    inter = step_time(case(**base, schedule=2.0, vpp=4.0), K)
    zb = step_time(case(**base, schedule=3.0), K)
    m = 128 / 8
    assert float(plain.bubble) == pytest.approx(float(plain.total - plain.bubble) / m * 7, rel=0.15)
    assert float(inter.bubble) == pytest.approx(float(plain.bubble) / 4)
    assert 0.2 * float(plain.bubble) < float(zb.bubble) < 0.5 * float(plain.bubble)


def test_head_on_the_last_stage_slows_a_pipeline_of_even_layers() -> None:
    few = seconds(pp=8.0, dp=8.0, zero=1.0, opt_shard=8.0, fsdp_shard=1.0, vocab=1000.0)
    many = seconds(pp=8.0, dp=8.0, zero=1.0, opt_shard=8.0, fsdp_shard=1.0, vocab=256_000.0)
    assert many > 1.2 * few


def test_stages_hold_every_layer() -> None:
    c = case(n_layers=[80, 126, 61, 32], pp=[8, 16, 4, 1], ends_fewer=[0, 1, 0, 0])
    s = stages(c)
    inner = np.maximum(c.pp - 2, 0)
    held = s.first + np.where(c.pp > 1, s.last, 0) + inner * s.middle
    assert np.all(held >= c.n_layers)
    assert held[0] == 80
    assert held[1] == 126


def test_total_parameters_are_those_of_llama3() -> None:
    assert float(total_params(case())) == pytest.approx(8_030_261_248, rel=1e-6)


def test_sequence_parallelism_and_fp8_help_and_moe_works() -> None:
    tp = {"tp": 8.0, "dp": 8.0, "zero": 1.0, "opt_shard": 8.0, "fsdp_shard": 1.0}
    assert seconds(**tp, sp=1.0) < seconds(**tp)
    assert seconds(fp8=1.0, gemm_rate=1402e12) < seconds()
    moe = {"n_experts": 8.0, "top_k": 2.0, "d_expert": 14336.0, "zero": 1.0, "fsdp_shard": 1.0}
    spread = seconds(**moe, ep=8.0)
    assert np.isfinite(spread)
    assert step_time(case(**moe, ep=8.0), K).ep_comm > 0
    assert step_time(case(**moe, ep=1.0), K).ep_comm == 0


def test_power_holds_matmuls_back_where_watts_are_short() -> None:
    """Half the board power a FLOP: 0.7 of the rate, on parts that are limited by it only."""
    full, half = (step_time(case(watts=w), K).matmul for w in (0.7, 0.35))
    assert half / full == pytest.approx(2**0.5)
    plenty, unknown = (step_time(case(watts=w), K).matmul for w in (2.7, np.inf))
    assert plenty == unknown
    assert plenty < full
    ampere = ARCHS.index("ampere")
    assert step_time(case(watts=0.35, arch=ampere), K).matmul == step_time(case(watts=0.7, arch=ampere), K).matmul


def test_dropped_tokens_balance_the_experts() -> None:
    moe = {"n_experts": 8, "top_k": 2, "ep": 8, "d_expert": 14336, "global_batch": 128}
    even, busy = (step_time(case(**moe, dropped=d), K).matmul for d in (1, 0))
    assert 0.85 < even / busy < 0.99


def test_arrays_and_single_cases_agree() -> None:
    many = seconds(tp=[1, 2, 4], dp=[64, 32, 16])
    for i, (tp, dp) in enumerate([(1, 64), (2, 32), (4, 16)]):
        assert float(seconds(tp=float(tp), dp=float(dp))) == pytest.approx(float(many[i]))


def test_modern_dispatchers_cross_the_network_once_a_domain() -> None:
    """Eight of 64 experts over four nodes: 3 (1 - (3/4)^8) copies cross instead of six."""
    moe = {"n_experts": 64, "top_k": 8, "ep": 32, "d_expert": 2048, "global_batch": 128}
    plain, once = (step_time(case(**moe, modern=m), K).ep_comm for m in (0, 1))
    assert once / plain == pytest.approx(3 * (1 - 0.75**8) / 6, rel=0.05)
    inside = {**moe, "ep": 8}
    assert step_time(case(**inside, modern=0), K).ep_comm == step_time(case(**inside, modern=1), K).ep_comm


def test_experts_in_few_groups_are_in_few_domains() -> None:
    """DeepSeek-V3's 4 of 8 groups: over 8 domains a token reaches what 8 draws of 4 do; in one domain nothing changes;
    over 2 domains of 4 groups each it is likely to be in both."""
    moe = {"n_experts": 256.0, "top_k": 8.0, "d_expert": 2048.0, "modern": 1.0}
    grouped = {"groups": 8.0, "top_groups": 4.0}

    def share(ep: float) -> float:
        free, held = (step_time(case(**moe, **g, ep=ep), K).ep_comm for g in ({}, grouped))
        return float(held / free)

    assert share(64.0) == pytest.approx(4 * (1 - 0.75**8) / (8 * (1 - 0.875**8)), rel=0.02)
    assert share(8.0) == 1.0
    assert 0.9 < share(16.0) < 1.0


def test_an_exchange_beside_compute_costs_what_is_longer() -> None:
    moe = {"n_experts": 64.0, "top_k": 8.0, "d_expert": 2048.0, "ep": 64.0}
    for nic, hidden in ((4e12, "all"), (4e10, "some")):
        apart, beside = (step_time(case(**moe, nic_bw=nic, ep_overlap=x), K) for x in (0.0, 1.0))
        busy = apart.matmul + apart.attention + apart.memory_bound
        if hidden == "all":
            assert apart.ep_comm < busy
            assert beside.ep_comm == 0 < apart.ep_comm
        else:
            # Less is left than compute alone would leave, where launching takes longer than the device.
            assert 0 < beside.ep_comm <= (apart.ep_comm - busy) * (1 + 1e-9)



def test_many_small_experts_keep_the_host_busy() -> None:
    """With next to no work on the device the step grows with the experts a rank launches, more with block scales."""
    tiny = {"d_model": 256, "d_expert": 32, "d_ff": 64, "seq": 64, "n_experts": 128, "top_k": 1, "vocab": 256}
    few, many = (float(step_time(case(**tiny, ep=e), K).total) for e in (64, 8))
    scaled, blocks = (float(step_time(case(**tiny, ep=8, fp8=f), K).total) for f in (1, 2))
    assert few < many < scaled < blocks
    layers, passes = 32, 2 * 2.8
    assert many - few == pytest.approx(14 * 2 * K.expert_launch_s * layers * passes, rel=0.1)
