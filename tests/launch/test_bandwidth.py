"""What the network should give by axis, and whose links give less."""

from __future__ import annotations

import pytest

from trainsys.launch.bandwidth import AxisRate, expected, slow_groups
from trainsys.layout import Layout
from trainsys.planner.cluster import load_cluster

LAYOUT = Layout(pp=1, dp_replicate=1, dp_shard=4, cp=1, tp=4, ep=1)


def rates(bad: int = -1, share: float = 0.2) -> dict[int, tuple[AxisRate, ...]]:
    """Every rank's; groups that ``bad`` is in reach ``share`` of the others' rate."""
    found = {}
    for rank in range(LAYOUT.world):
        own = []
        for axis, rate in (("tp", 300e9), ("fsdp", 40e9)):
            ranks = tuple(LAYOUT.group_of(axis, rank))  # type: ignore[arg-type]
            own.append(AxisRate(axis, ranks, rate * (share if bad in ranks else 1.0)))
        found[rank] = tuple(own)
    return found


def test_a_fit_network_is_not_blamed() -> None:
    assert slow_groups(rates(), {}) == []
    assert slow_groups(rates(), {"tp": 450e9, "fsdp": 50e9}) == []


def test_the_rank_in_both_slow_groups_is_blamed() -> None:
    found = slow_groups(rates(bad=6), {})
    assert [rank for rank, _ in found] == [6, 6]
    assert found[0][1] == "tp: all-reduce of ranks 4-7 at 60 GB/s per rank, the median group at 300"


def test_all_groups_may_be_below_what_the_cluster_should_give() -> None:
    found = slow_groups(rates(), {"tp": 450e9, "fsdp": 400e9})
    assert len(found) == 4
    assert all("fsdp: all-reduce of ranks" in text and "400 expected" in text for _, text in found)


def test_expectation_counts_who_shares_the_nics() -> None:
    cluster = load_cluster("dgx-h100")  # 8 GPUs a node, 400 Gbit/s = 50 GB/s each
    axes, vast = ("tp", "fsdp"), 2.0**40  # so vast that latency does not count
    wide = expected(cluster, Layout(pp=1, dp_replicate=1, dp_shard=4, cp=1, tp=8, ep=1), axes, vast)
    assert wide["fsdp"] == pytest.approx(50e9, rel=1e-3), "eight groups leave the node at once"
    assert wide["tp"] == pytest.approx(450e9, rel=1e-3)
    alone = expected(cluster, Layout(pp=1, dp_replicate=1, dp_shard=32, cp=1, tp=1, ep=1), axes[1:], vast)
    assert alone["fsdp"] == pytest.approx(400e9, rel=1e-3), "one group has all eight"
