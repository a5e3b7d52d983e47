"""What was found while a run trained, beside what its whole record shows: a finding that the end does not confirm is
withdrawn in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainsys.profiler.verdict import Verdict
from trainsys.telemetry.events import Finding

PLACES = ("node", "switch")
"""Kinds of verdicts on several ranks that stand for each of them."""


@dataclass(frozen=True)
class SaidLive:
    """``at_step``: when it was said first; ``until``: None if it was still so at the end."""

    title: str
    at_step: int
    since: int
    until: int | None
    cost_s: float
    confirmed: bool
    """The whole run's record shows it too."""

    def __str__(self) -> str:
        until = "" if self.until is None else f" to {self.until}"
        outcome = "the whole record shows it too" if self.confirmed else "withdrawn: the whole record does not show it"
        return f"{self.title} ({1e3 * self.cost_s:,.1f} ms per step, since step {self.since}{until}); {outcome}"


def finding_of(verdict: Verdict, step: int, hosts: Sequence[str]) -> Finding:
    """The record of a live verdict; ``hosts[rank]`` is each rank's node, or there are none."""
    blamed = sorted({hosts[rank] for rank in verdict.ranks if rank < len(hosts)} - {""})
    return Finding(
        step=step, kind=verdict.kind, news=verdict.news, title=verdict.title, evidence=verdict.evidence,
        advice=verdict.advice, cause=verdict.cause, phase=verdict.phase, ranks=list(verdict.ranks), hosts=blamed,
        since=verdict.since, until=verdict.until, cost_s=verdict.cost_s, share=verdict.share,
    )  # fmt: skip


def said_live(findings: Iterable[Finding], verdicts: Sequence[Verdict]) -> list[SaidLive]:
    """One for each that was new, in order, as it was said last; ``verdicts`` are those of the whole run."""
    last: list[tuple[int, Finding]] = []
    open_at: dict[tuple[object, ...], int] = {}
    for f in findings:
        key = f.kind, *f.ranks, f.phase
        at = open_at.get(key)
        if f.news == "new" or at is None:
            at = open_at[key] = len(last)
            last.append((f.step, f))
        else:
            last[at] = last[at][0], f
        if f.until is not None:
            del open_at[key]
    return [SaidLive(f.title, at, f.since, f.until, f.cost_s, _confirmed(f, verdicts)) for at, f in last]


def _confirmed(f: Finding, verdicts: Sequence[Verdict]) -> bool:
    """By a verdict of its kind on the same ranks, or on a place that has them, in steps that overlap."""
    return any(
        set(v.ranks) >= set(f.ranks) and v.kind in (f.kind, *(PLACES if f.kind == "rank" else ()))
        and v.since <= (f.until if f.until is not None else v.since) and (v.until is None or v.until >= f.since)
        for v in verdicts
    )  # fmt: skip
