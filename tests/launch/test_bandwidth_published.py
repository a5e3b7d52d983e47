"""Pre-flight against what NCCL is known to reach, on clusters that are fit and on some that are not.

Times are nccl-tests' out-of-place ``all_reduce_perf`` as published, microseconds by MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from trainsys.launch.bandwidth import SHARE, AxisRate, expected, sent, slow_groups
from trainsys.layout import Layout
from trainsys.planner.cluster import Cluster
from trainsys.train import preflight

MIB = 2**20


@dataclass(frozen=True)
class Curve:
    source: str
    device: str
    gpus: int
    nic_gbit: float
    us: dict[int, float] = field(default_factory=dict)
    domain: int = 8

    def reached(self, mib: int) -> float:
        return sent(mib * MIB, self.gpus) / (self.us[mib] * 1e-6)

    def expected(self, mib: int) -> float:
        cluster = Cluster(
            name="made", device=self.device, gpus_per_node=self.domain, nic_gbit_per_gpu=self.nic_gbit
        )
        return expected(cluster, Layout(dp_shard=self.gpus), ("fsdp",), mib * MIB)["fsdp"]


# NVLink 4 as an H100's, 450 GB/s one way.
H20_8 = Curve(
    "8 x H20, NCCL 2.30: github.com/kvcache-ai/Mooncake/pull/3484", "H100-SXM-80", 8, 400,
    {4: 53.24, 16: 121.33, 128: 700.25, 256: 1366.17, 512: 2671.60, 1024: 5252.64},
)  # fmt: skip
B200_8 = Curve(
    "8 x B200: github.com/NVIDIA/nccl-tests/issues/333", "B200-SXM", 8, 400,
    {4: 20.14, 16: 47.37, 64: 169.4, 128: 311.2, 256: 594.2, 512: 1166.1, 1024: 2315.6},
)  # fmt: skip
H100_16 = Curve(
    "2 p5.48xlarge, EFA: EKS blueprints for Terraform, patterns/nvidia-gpu-efa", "H100-SXM-80", 16, 400,
    {4: 163.7, 16: 278.6, 64: 587.2, 128: 926.6, 256: 1497.8, 512: 2558.6, 1024: 4553.6},
)  # fmt: skip
A100_16 = Curve(
    "2 BM.GPU4.8, 16 x 100 Gbit/s RoCE each: github.com/oracle-quickstart/oci-hpc-oke", "A100-SXM-40", 16, 200,
    {4: 127.0, 16: 282.7, 64: 821.7, 128: 1542.0, 256: 3042.7, 512: 6436.0, 1024: 9187.8},
)  # fmt: skip
FIT = [H20_8, B200_8, H100_16, A100_16]
# Dual 200 Gbit/s ports for each GPU, but flows of three nodes collide on their way through the spine.
SPINE = Curve(
    "3 x 8 H100: github.com/NVIDIA/nccl/issues/1453", "H100-SXM-80", 24, 400,
    {4: 622.6, 16: 1334.9, 64: 24410.0, 128: 49264.0, 256: 125807.0, 512: 193909.0},
)  # fmt: skip
# What a node gives whose RDMA devices NCCL has not found: one network card of 25 Gbit/s (measured between two T4).
SOCKETS = Curve(
    "one card of 25 Gbit/s, where 8 of 400 are meant: EKS EFA guide",
    "H100-SXM-80",
    2,
    400,
    {256: 85119.0},
    domain=1,
)


@pytest.mark.parametrize("curve", FIT, ids=lambda c: c.source.split(":")[0])
def test_a_fit_cluster_passes_at_each_published_size(curve: Curve) -> None:
    for mib in curve.us:
        assert curve.reached(mib) > 1.1 * SHARE * curve.expected(mib), mib
    # And at the size that pre-flight sends with a margin that a bad day does not eat.
    assert curve.reached(256) > 1.5 * SHARE * curve.expected(256)


@pytest.mark.parametrize("curve", [SPINE, SOCKETS], ids=lambda c: c.source.split(":")[0])
def test_a_cluster_that_is_not_fit_fails(curve: Curve) -> None:
    assert curve.reached(256) < 0.3 * SHARE * curve.expected(256)
    rate = AxisRate("fsdp", tuple(range(curve.gpus)), curve.reached(256))
    ((rank, text),) = slow_groups({r: [rate] for r in rate.ranks}, {"fsdp": curve.expected(256)})
    assert rank in rate.ranks
    assert "expected" in text


@pytest.mark.parametrize("curve", FIT, ids=lambda c: c.source.split(":")[0])
def test_half_of_a_fit_clusters_rate_fails(curve: Curve) -> None:
    """A NIC or NVLink that is down of two: caught at the size that pre-flight sends, not at a small one."""
    assert curve.reached(256) / 2 < SHARE * curve.expected(256)


def test_latency_is_in_what_is_expected_of_a_small_message() -> None:
    """Against line rate alone a healthy 4 MiB failed: 53 us where 33 were allowed."""
    line = 450e9
    assert H20_8.reached(4) < SHARE * line < H20_8.reached(256)
    assert H20_8.expected(4) < 0.4 * line < 0.9 * line < H20_8.expected(256) < line
    assert H20_8.expected(1024) / line > H20_8.expected(256) / line


def test_a_device_is_timed_by_its_own_clock_after_a_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("mark")

        def synchronize(self) -> None:
            did.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * did.count("work")  # ms: of work that is not between the marks as well

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = preflight._seconds(lambda: did.append("work"), torch.device("cuda"))
    calls = preflight._TIMES
    assert did == ["work", "mark", *["work"] * calls, "mark", "wait"], "no wait of the host between two calls"
    assert seconds == (calls + 1) / calls
    assert preflight._REDUCE_BYTES["cuda"] == 256 * MIB, "the size that the tests above judge"
