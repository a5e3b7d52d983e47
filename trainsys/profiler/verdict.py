"""A finding about a run, and how sure one has to be to make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainsys.profiler.steps import StepTable
from trainsys.profiler.straggler import LEAST_STEPS, Straggler

ALPHA = 0.01
"""Probability that a run without a fault gets any verdict about ranks, nodes, links or stages."""
TESTS = 4
"""Families of tests that share it: ranks, nodes, links, stages."""
LEAST_SHARE = 0.01
"""What costs less of a step is not worth a name."""

OF_NO_RANK = ("gc", "run")
"""Kinds for which nobody is late for good."""


@dataclass(frozen=True)
class Verdict:
    """What it is, what shows it, what to do; who, in which phase, since when, and what all ranks lose by it."""

    kind: str
    """rank, node, switch, link, gc, sequence, stage, run."""
    title: str
    evidence: str
    advice: str
    cost_s: float
    """Seconds per step that all ranks would save without it."""
    share: float
    """``cost_s`` as a share of the step time, 0..1."""
    ranks: tuple[int, ...]
    """Empty: it is nobody's in particular."""
    phase: str
    """For a rank or node: data, compute, forward, backward, optimizer, other; for a link: its axis."""
    since: int
    """First step that shows it."""
    until: int | None = None
    """Last step that showed it; None: to the end."""
    cause: str = ""
    """Why a rank or node is late, by its host's counters (``causes``); "gc" and "link" for those kinds; "": unknown."""
    news: Literal["new", "worse", "lasting", "over"] = "new"
    """While a run trains: what is new about it (``findings``)."""

    @property
    def key(self) -> tuple[object, ...]:
        """The same finding in another window has the same key."""
        return self.kind, self.ranks, self.phase


def ended(table: StepTable, s: Straggler) -> int | None:
    """The last step in which it was slow; None where that was so to the window's end, or nearly."""
    return int(table.steps[s.until - 1]) if len(table.steps) - s.until >= LEAST_STEPS // 2 else None
