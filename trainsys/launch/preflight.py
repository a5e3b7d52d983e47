"""What the ranks' reports of a pre-flight say: which node is bad, and why. Without torch, so it is tested alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLOW = 0.6
"""A rank below this share of the median rank's rate is bad: nodes of one kind are within a few percent."""
CLOCK_S = 2.0
FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Report:
    """What one rank has found. Rates in FLOP/s and bytes/s; ``clock_s`` against rank 0's, by a common barrier."""

    rank: int
    host: str
    versions: dict[str, str]
    devices: int
    ranks_here: int
    on_devices: bool
    matmul_flops: float
    matmul_right: bool
    memory_bytes_s: float
    memory_right: bool
    clock_s: float
    free_bytes: int
    sees_shared: bool
    folder: str


@dataclass(frozen=True)
class Problem:
    host: str
    text: str

    def __str__(self) -> str:
        return f"node {self.host}: {self.text}"


def judge(reports: Sequence[Report]) -> list[Problem]:
    """Every problem, each with the node to blame; several ranks of a node make one problem of a kind."""
    found: dict[tuple[str, str], Problem] = {}

    def blame(kind: str, r: Report, text: str) -> None:
        found.setdefault((kind, r.host), Problem(r.host, text))

    for r in reports:
        if r.on_devices and r.devices < r.ranks_here:
            blame("devices", r, f"{r.devices} devices visible to its {r.ranks_here} ranks")
        if not r.matmul_right:
            blame("wrong", r, f"rank {r.rank}: a matrix product came out wrong; take the node out of service")
        if not r.memory_right:
            blame(
                "memory",
                r,
                f"rank {r.rank}: memory does not hold what was written; take the node out of service",
            )
        if abs(r.clock_s) > CLOCK_S:
            blame("clock", r, f"its clock is {r.clock_s:+.1f} s off that of rank 0; does NTP run?")
        if r.free_bytes < FREE_BYTES:
            blame(
                "disk",
                r,
                f"{r.free_bytes / 2**30:.1f} GiB free in {r.folder}; {FREE_BYTES // 2**30} are needed",
            )
        if not r.sees_shared:
            blame(
                "shared",
                r,
                f"{r.folder} is not the folder that rank 0 sees; set telemetry.out to a shared one",
            )
    _versions(reports, blame)
    for what, unit, scale, rates in (
        ("matmul", "TFLOP/s", 1e12, [r.matmul_flops for r in reports]),
        ("memory", "GB/s", 1e9, [r.memory_bytes_s for r in reports]),
    ):
        median = statistics.median(rates)
        for r, rate in zip(reports, rates, strict=True):
            if rate < SLOW * median:
                shown = f"{rate / scale:.3g} {unit}, the median rank at {median / scale:.3g}"
                blame(f"slow {what}", r, f"rank {r.rank}: {what} at {shown}")
    return list(found.values())


def _versions(reports: Sequence[Report], blame: Callable[[str, Report, str], None]) -> None:
    """Blame whoever differs from most."""
    for name in sorted({name for r in reports for name in r.versions}):
        usual = Counter(r.versions.get(name, "missing") for r in reports).most_common(1)[0][0]
        for r in reports:
            own = r.versions.get(name, "missing")
            if own != usual:
                blame(name, r, f"{name} {own}, but most ranks have {usual}")
