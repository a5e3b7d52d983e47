"""All-reduce bandwidth of each axis: what a cluster should give, and which node's links give less."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainsys.layout import Axis, Layout
from trainsys.planner.cluster import Cluster
from trainsys.planner.collectives import Group, hop_seconds
from trainsys.planner.constants import shipped
from trainsys.rank_lists import ranks_named

SHARE = 0.5
"""Least share of the expected bandwidth, or of the axis's median group. Published all-reduces of 64 MiB and
more reach at least 67% of it on healthy clusters, of 256 MiB 76% (``tests/launch/test_bandwidth_published.py``)."""


@dataclass(frozen=True)
class AxisRate:
    """An all-reduce by one group of an axis. ``bytes_s`` is what a rank sends: 2 (n-1)/n of the tensor, a second."""

    axis: str
    ranks: tuple[int, ...]
    bytes_s: float


def expected(cluster: Cluster, layout: Layout, axes: Sequence[Axis], nbytes: float) -> dict[str, float]:
    """Bytes/s that a rank of each axis sends in an all-reduce of ``nbytes`` when all groups of the axis work at once: at
    line rate, after the latency of its hops (the planner's; half of what 8 GPUs take for 4 MiB is latency).

    Line rate inside of a scale-up domain is that of its link; across domains a rank's part of the NICs, which the groups
    that leave the domain share.
    """
    machine, constants = cluster.machine(), shipped()
    found = {}
    for axis in axes:
        ranks = layout.groups(axis)[0]
        local = sum(rank // cluster.domain == ranks[0] // cluster.domain for rank in ranks)
        inside = min(machine.link_bw, machine.pair_bw) if local <= 2 else machine.link_bw
        crosses = local < len(ranks)
        rate = min(inside, machine.nic_bw * local / machine.domain) if crosses else inside
        n, near = np.asarray(float(len(ranks))), np.asarray(float(local))
        group = Group(n, near, np.asarray(rate), hop_seconds(constants, near, np.asarray(crosses)))
        found[str(axis)] = float(sent(nbytes, len(ranks)) / group.all_reduce(nbytes))
    return found


def sent(nbytes: float, n: int) -> float:
    """Bytes that each of ``n`` ranks of a ring sends to all-reduce ``nbytes``."""
    return 2.0 * nbytes * (n - 1) / n


def slow_groups(
    rates: Mapping[int, Sequence[AxisRate]], expected: Mapping[str, float]
) -> list[tuple[int, str]]:
    """(rank, what is wrong): of each group that is slow, the rank whose own groups are slow on most axes.

    A group is slow below ``SHARE`` of ``expected`` or, where that is not known, of its axis's median group.
    """
    groups: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for own in rates.values():
        for rate in own:
            # A ring is as fast as its slowest member says.
            known = groups[rate.axis].get(rate.ranks, float("inf"))
            groups[rate.axis][rate.ranks] = min(known, rate.bytes_s)
    slow: list[tuple[str, tuple[int, ...], float, str]] = []
    for axis, by_ranks in groups.items():
        median = statistics.median(by_ranks.values())
        for ranks, reached in by_ranks.items():
            if axis in expected and reached < SHARE * expected[axis]:
                slow.append((axis, ranks, reached, f"{expected[axis] / 1e9:.3g} expected"))
            elif axis not in expected and reached < SHARE * median:
                slow.append((axis, ranks, reached, f"the median group at {median / 1e9:.3g}"))
    times = {rank: sum(rank in ranks for _, ranks, _, _ in slow) for rank in rates}
    return [
        (
            max(ranks, key=lambda rank: times[rank]),
            f"{axis}: all-reduce of {ranks_named(ranks)} at {rate / 1e9:.3g} GB/s per rank, {than}",
        )
        for axis, ranks, rate, than in slow
    ]
