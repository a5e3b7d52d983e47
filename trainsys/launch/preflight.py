"""What the ranks' reports of a pre-flight say: which node is bad, and why. Without torch, so it is tested alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainsys.launch.bandwidth import AxisRate, slow_groups

SLOW, SLOW_CORES = 0.6, 0.25
"""A rank below this share of the median rank's rate is bad: nodes of one kind are within a few percent, but cores
may be lent to others for a while."""
CLOCK_S = 2.0
FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Report:
    """What one rank has found. Rates in FLOP/s and bytes/s; ``clock_s`` against rank 0's, by a common barrier."""

    rank: int
    host: str
    versions: dict[str, str]
    on_devices: bool
    matmul_flops: float
    matmul_right: bool
    memory_bytes_s: float
    memory_right: bool
    clock_s: float
    free_bytes: int
    sees_shared: bool
    folder: str
    axes: tuple[AxisRate, ...] = ()


@dataclass(frozen=True)
class Problem:
    """``sure``: this node is to blame beyond doubt, so a job may go on without it."""

    host: str
    text: str
    sure: bool

    def __str__(self) -> str:
        return f"node {self.host}: {self.text}"


class _Found:
    """Several ranks of a node make one problem of a kind."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._hosts = len({r.host for r in reports})
        self._texts: dict[str, dict[str, str]] = {}

    def blame(self, kind: str, r: Report, text: str) -> None:
        self._texts.setdefault(kind, {}).setdefault(r.host, text)

    def problems(self) -> list[Problem]:
        return [
            Problem(host, text, self._sure(kind, len(texts)))
            for kind, texts in self._texts.items()
            for host, text in texts.items()
        ]

    def _sure(self, kind: str, hosts: int) -> bool:
        if kind in _OWN:
            return True
        if kind in _RELATIVE:
            # Rank 0's node is the measure of these: it is right only as long as most agree with it.
            return 2 * hosts < self._hosts
        return hosts < self._hosts  # what all nodes have is not a node's fault


_OWN = ("wrong", "memory")
_RELATIVE = ("clock", "shared", "version")


def judge(reports: Sequence[Report], expected: dict[str, float] | None = None) -> list[Problem]:
    """Every problem, each with the node to blame. ``expected``: bytes/s of a ring over each axis."""
    found = _Found(reports)
    for r in reports:
        if not r.matmul_right:
            text = "a matrix product came out wrong; take the node out of service"
            found.blame("wrong", r, f"rank {r.rank}: {text}")
        if not r.memory_right:
            text = "memory does not hold what was written; take the node out of service"
            found.blame("memory", r, f"rank {r.rank}: {text}")
        if abs(r.clock_s) > CLOCK_S:
            found.blame("clock", r, f"its clock is {r.clock_s:+.1f} s off that of rank 0; does NTP run?")
        if r.free_bytes < FREE_BYTES:
            free = f"{r.free_bytes / 2**30:.1f} GiB free in {r.folder}"
            found.blame("disk", r, f"{free}; {FREE_BYTES // 2**30} are needed")
        if not r.sees_shared:
            text = f"{r.folder} is not the folder that rank 0 sees; set telemetry.out to a shared one"
            found.blame("shared", r, text)
    _versions(reports, found)
    _rates(reports, found)
    by_rank = {r.rank: r for r in reports}
    for rank, text in slow_groups({r.rank: r.axes for r in reports}, expected or {}):
        found.blame("slow network", by_rank[rank], text)
    return found.problems()


def _rates(reports: Sequence[Report], found: _Found) -> None:
    for what, unit, scale, rates in (
        ("matmul", "TFLOP/s", 1e12, [r.matmul_flops for r in reports]),
        ("memory", "GB/s", 1e9, [r.memory_bytes_s for r in reports]),
    ):
        median = statistics.median(rates)
        for r, rate in zip(reports, rates, strict=True):
            if rate < (SLOW if r.on_devices else SLOW_CORES) * median:
                shown = f"{rate / scale:.3g} {unit}, the median rank at {median / scale:.3g}"
                found.blame(f"slow {what}", r, f"rank {r.rank}: {what} at {shown}")


def _versions(reports: Sequence[Report], found: _Found) -> None:
    """Blame whoever differs from most."""
    for name in sorted({name for r in reports for name in r.versions}):
        usual = Counter(r.versions.get(name, "missing") for r in reports).most_common(1)[0][0]
        for r in reports:
            own = r.versions.get(name, "missing")
            if own != usual:
                found.blame("version", r, f"{name} {own}, but most ranks have {usual}")
