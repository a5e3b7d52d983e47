"""Ring costs by hand, and the NICs that concurrent groups share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support_cases import case

from trainsys.planner.collectives import all_to_all, group, send_recv
from trainsys.planner.constants import from_priors

K = replace(from_priors(), link_eff=1.0, nic_eff=1.0, hop_intra_s=0.0, hop_inter_s=0.0)


def arr(x: float) -> np.ndarray[tuple[()], np.dtype[np.float64]]:
    return np.asarray(float(x))


def test_ring_inside_a_node_by_hand() -> None:
    g = group(case(), K, arr(8), arr(1))
    assert float(g.ring(8e9)) == pytest.approx(7 / 8 * 8e9 / 450e9)
    assert float(g.all_reduce(8e9)) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9)


def test_groups_that_cross_nodes_share_the_nics() -> None:
    """Stride 8: one member a node, eight groups at once, each gets one NIC. Stride 1: all eight NICs serve one."""
    c = case()
    assert float(group(c, K, arr(4), arr(8)).rate) == pytest.approx(50e9)
    assert float(group(c, K, arr(32), arr(1)).rate) == pytest.approx(400e9)
    assert float(group(c, K, arr(16), arr(2)).rate) == pytest.approx(200e9)


def test_one_member_costs_nothing() -> None:
    g = group(case(), K, arr(1), arr(8))
    assert float(g.ring(1e9)) == 0.0
    assert float(all_to_all(g, case(), K, arr(1e9))) == 0.0


def test_mesh_pair_is_slower_than_the_whole_mesh() -> None:
    """MI300X: two GPUs share one 64 GB/s link, eight share seven."""
    c = case(link_bw=448e9, pair_bw=64e9)
    assert float(group(c, K, arr(2), arr(1)).rate) == pytest.approx(64e9)
    assert float(group(c, K, arr(8), arr(1)).rate) == pytest.approx(448e9)


def test_all_to_all_waits_for_the_slower_tier() -> None:
    c = case()
    inside = float(all_to_all(group(c, K, arr(8), arr(1)), c, K, arr(8e9)))
    across = float(all_to_all(group(c, K, arr(16), arr(1)), c, K, arr(8e9)))
    assert inside == pytest.approx(7e9 / 450e9)
    assert across == pytest.approx(4e9 / 50e9)


def test_neighbouring_stages_in_one_node_use_the_link() -> None:
    c = case()
    assert float(send_recv(c, K, arr(1e9), arr(4))) < float(send_recv(c, K, arr(1e9), arr(8)))
