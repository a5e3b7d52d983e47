"""Two runs: what got slower, by term and by kernel, a step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainsys.profiler.trace.breakdown import Terms
from trainsys.profiler.trace.report import RankReport, Report
from trainsys.profiler.trace.text import ms, table

TERMS = ("matmul", "other_compute", "comm_exposed", "memcpy_exposed", "idle")


@dataclass(frozen=True, slots=True)
class Change:
    """ns per step, mean over ranks, before and after."""

    name: str
    kind: str
    before_ns: float
    after_ns: float
    calls_before: float = 0.0
    calls_after: float = 0.0

    @property
    def delta_ns(self) -> float:
        return self.after_ns - self.before_ns


@dataclass(slots=True)
class RunDiff:
    """``terms`` sum to ``span``; ``kernels`` by the size of their change. ``per``: what a figure is of."""

    span: Change
    terms: list[Change]
    kernels: list[Change]
    per: str
    verdict: str
    notes: list[str] = field(default_factory=list)


def compare_runs(before: Report, after: Report) -> RunDiff:
    """Compare by profiler step where both runs have steps, else by whole trace."""
    stepped = all(r.breakdown is not None and r.breakdown.steps for r in before.ranks + after.ranks)
    per = "step" if stepped and before.ranks and after.ranks else "trace"
    spans = [_mean(r.ranks, "span", per) for r in (before, after)]
    terms = [Change(t, "term", _mean(before.ranks, t, per), _mean(after.ranks, t, per)) for t in TERMS]
    rows_before, rows_after = _kernels(before.ranks, per), _kernels(after.ranks, per)
    kernels = [
        Change(
            name,
            kind,
            rows_before.get((name, kind), (0.0, 0.0))[0],
            rows_after.get((name, kind), (0.0, 0.0))[0],
            rows_before.get((name, kind), (0.0, 0.0))[1],
            rows_after.get((name, kind), (0.0, 0.0))[1],
        )
        for name, kind in sorted(rows_before.keys() | rows_after.keys())
    ]
    kernels.sort(key=lambda c: -abs(c.delta_ns))
    out = RunDiff(Change("span", "span", *spans), terms, kernels[:40], per, "")
    if len(before.ranks) != len(after.ranks):
        out.notes.append(
            f"{len(before.ranks)} ranks before, {len(after.ranks)} after: means over each run's own"
        )
    out.verdict = _verdict(out)
    return out


def _units(rank: RankReport, per: str) -> list[Terms]:
    assert rank.breakdown is not None
    return rank.breakdown.steps if per == "step" else [rank.breakdown.whole]


def _mean(ranks: list[RankReport], part: str, per: str) -> float:
    values = [getattr(t, part) for r in ranks if r.breakdown is not None for t in _units(r, per)]
    return sum(values) / len(values) if values else 0.0


def _kernels(ranks: list[RankReport], per: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(ns, calls) of each kernel a step, mean over ranks. Kernels outside the steps are spread over them."""
    out: dict[tuple[str, str], tuple[float, float]] = {}
    timed = [r for r in ranks if r.breakdown is not None]
    for r in timed:
        weight = 1 / (len(_units(r, per)) * len(timed))
        for k in r.kernels:
            ns, calls = out.get((k.name, k.kind), (0.0, 0.0))
            out[k.name, k.kind] = (ns + k.total_ns * weight, calls + k.count * weight)
    return out


def _verdict(d: RunDiff) -> str:
    change = d.span.delta_ns
    if not d.span.before_ns or abs(change) < 0.01 * d.span.before_ns:
        return f"no change: a {d.per} takes {ms(d.span.after_ns)} ms, before {ms(d.span.before_ns)}"
    worst = max(d.terms, key=lambda t: t.delta_ns if change > 0 else -t.delta_ns)
    way = "slower" if change > 0 else "faster"
    text = (
        f"{abs(change) / d.span.before_ns * 100:.1f}% {way}: a {d.per} takes {ms(d.span.after_ns)} ms, before "
        f"{ms(d.span.before_ns)}; most of it in {worst.name} ({worst.delta_ns / 1e6:+,.3f} ms)"
    )
    like = [k for k in d.kernels if (k.delta_ns > 0) == (change > 0)]
    if like and worst.name != "idle":
        text += f"; most changed kernel {like[0].name[:80]} ({like[0].delta_ns / 1e6:+,.3f} ms)"
    return text


def render_diff(d: RunDiff) -> str:
    out = [f"Against the other run, per {d.per}: {d.verdict}"]
    out += table(
        ("term", "before ms", "after ms", "change ms"),
        [(c.name, ms(c.before_ns), ms(c.after_ns), f"{c.delta_ns / 1e6:+,.3f}") for c in (d.span, *d.terms)],
    )
    changed = [k for k in d.kernels if abs(k.delta_ns) >= 1000][:12]
    out += table(
        ("kernel", "calls before", "after", "before ms", "after ms", "change ms"),
        [
            (
                c.name[:60],
                f"{c.calls_before:.1f}",
                f"{c.calls_after:.1f}",
                ms(c.before_ns),
                ms(c.after_ns),
                f"{c.delta_ns / 1e6:+,.3f}",
            )
            for c in changed
        ],
    )
    return "\n".join(out + [f"  {n}" for n in d.notes]) + "\n"
