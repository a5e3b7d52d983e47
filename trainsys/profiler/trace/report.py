"""What ``trainsys trace`` says: one typed tree, the same for terminal, JSON and HTML. Times in ns unless named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from trainsys.profiler.timeline import Timeline
from trainsys.profiler.trace.breakdown import Breakdown
from trainsys.profiler.trace.critical import CriticalPath
from trainsys.profiler.trace.health import Finding
from trainsys.profiler.trace.kernels import KernelRow, LaunchStats
from trainsys.profiler.trace.roofline import ProductRow, Work

if TYPE_CHECKING:
    from trainsys.profiler.hang.report import HangReport
    from trainsys.profiler.memory_snapshot.report import MemoryReport
    from trainsys.profiler.trace.across import Across
    from trainsys.profiler.trace.optimeline import TimelineReport

SCHEMA = "trainsys.trace/1"


@dataclass(frozen=True, slots=True)
class Mfu:
    """A utilisation with its definition: ``value`` = FLOPs / (time x peak)."""

    value: float
    flops: str
    """Which FLOPs, in words."""
    peak: str


@dataclass(slots=True)
class RankReport:
    """One trace file."""

    path: str
    rank: int
    world: int
    device: str
    host: str
    events: int
    size_bytes: int
    breakdown: Breakdown | None
    kernels: list[KernelRow]
    launch: LaunchStats
    products: list[ProductRow]
    work: Work
    mfu: Mfu | None
    peak_device: str
    """The catalogue's name of the device, empty where the trace's name matches none."""
    said: dict[str, int]
    """What was repaired, dropped, assumed or could not be linked, and how often."""
    window: int = 0
    """Which of its rank's captures: 0 for the first stretch of time that was captured."""
    lane: int | None = None
    """The device of a file with several; each is a row of its own. None: the file has one."""
    health: list[Finding] = field(default_factory=list)
    """What is missing or contradicts itself, and what is withheld for it."""

    def trusted(self, what: str) -> bool:
        """Whether nothing spoils this kind of figure: ``time``, or ``idle`` (which all that spoils time spoils too)."""
        return not any(f.spoils == "time" or f.spoils == what for f in self.health)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding: what it is, what shows it, what to do. ``share`` of the step's time it concerns."""

    kind: str
    title: str
    evidence: str
    advice: str
    share: float


@dataclass(frozen=True, slots=True)
class Unread:
    """A file that was given and not analysed, and why."""

    path: str
    why: str


@dataclass(slots=True)
class Report:
    ranks: list[RankReport] = field(default_factory=list)
    across: Across | None = None
    critical: CriticalPath | None = None
    critical_rank: int | None = None
    hang: HangReport | None = None
    memory: list[MemoryReport] = field(default_factory=list)
    timelines: list[TimelineReport] = field(default_factory=list)
    timeline: Timeline | None = None
    """All ranks on one time axis; only where a page is written."""
    verdicts: list[Verdict] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    schema: str = SCHEMA

    @property
    def world(self) -> int:
        """Ranks of the job as far as the files tell: never fewer than were given."""
        return max([r.world for r in self.ranks] + [len({r.rank for r in self.ranks})])

    def label(self, r: RankReport) -> str:
        """``3``; with the capture and the device where there are several."""
        out = str(r.rank)
        if any(o.window for o in self.ranks):
            out += f" capture {r.window + 1}"
        return out if r.lane is None else f"{out} device {r.lane}"


def to_json(report: Report) -> bytes:
    """The report as JSON, keys as in the dataclasses."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of :func:`to_json`'s output, derived from the same classes."""
    from trainsys.profiler.hang.report import HangReport
    from trainsys.profiler.memory_snapshot.report import MemoryReport
    from trainsys.profiler.trace.across import Across
    from trainsys.profiler.trace.optimeline import TimelineReport

    # The annotations of ``Report`` are looked up in this module, which does without these to start sooner.
    globals().update({c.__name__: c for c in (Across, HangReport, MemoryReport, TimelineReport)})
    return msgspec.json.schema(Report)
