"""The names under which every sink shows a step: five sections, one unit a name."""

from __future__ import annotations

from trainsys.telemetry.aggregate import Aggregate, Spread
from trainsys.telemetry.events import COMM, Finding, Step

GIB = 1 << 30

SECTIONS = {
    "train": "what is learned: loss, grad_norm, lr, tokens (seen so far)",
    "perf": "how fast: step_time_s, tokens_per_s, flops_per_s, mfu, mfu_palm, hfu (0..1)",
    "time": "seconds per step by phase, mean over ranks, and max_ over ranks with the _rank that it is",
    "comm": "by axis: seconds of exposed communication (mean, and max_ with its _rank), GB moved by all ranks",
    "memory": "GiB of the rank that has most: allocated, reserved, peak, rss; peak_rank, rss_rank: which it is",
}


def step_metrics(
    step: Step, ranks: Aggregate | None = None, *, tokens: int | None = None, tokens_seen: int | None = None
) -> dict[str, float]:
    """Flat metrics of a step, by ``section/name``; what is not known is left out.

    With ``ranks`` times, bytes and memory are of all ranks, else of this one alone. ``tokens``: real tokens
    of the step over all ranks (default: ``ranks``', else this data rank's); ``tokens_seen``: since the run's
    first step.
    """
    out: dict[str, float] = {}
    seconds = ranks.step_time_s.mean if ranks else step.step_time_s
    for name, value in (
        ("train/loss", step.loss),
        ("train/grad_norm", step.grad_norm),
        ("train/lr", step.lr),
        ("train/tokens", tokens_seen),
    ):
        if value is not None:
            out[name] = float(value)
    count = tokens if tokens is not None else ranks.tokens if ranks else step.tokens
    out["perf/step_time_s"] = seconds
    if seconds > 0:
        out["perf/tokens_per_s"] = count / seconds
        if step.flops:
            out["perf/flops_per_s"] = step.flops.model / seconds
        for name in ("mfu", "mfu_palm", "hfu"):
            # Of the time shown beside it, which over a window of steps is not this one step's.
            if (share := getattr(step, name)) is not None:
                out[f"perf/{name}"] = share * step.step_time_s / seconds
    if step.memory:
        for field in ("allocated", "reserved", "peak", "rss"):
            if held := getattr(step.memory, field):
                out[f"memory/{field}_gib"] = held / GIB
    if ranks is None:
        out.update({_name(phase): s for phase, s in step.phases.items()})
        if step.stalls:
            out["time/stalls_s"] = sum(step.stalls.values())
        for axis, ops in step.comm.items():
            out[f"comm/{axis}_gb"] = sum(c.bytes for c in ops.values()) / 1e9
        return out
    for phase, spread in ranks.phases.items():
        out[_name(phase)] = spread.mean
        out[_name(phase, "max_")] = spread.max
        out.update(_worst(_name(phase, "max_"), spread, ranks.ranks))
    if ranks.stalls_s.max:
        out["time/stalls_s"] = ranks.stalls_s.max
        out.update(_worst("time/stalls_s", ranks.stalls_s, ranks.ranks))
    for axis, moved in ranks.comm_bytes.items():
        out[f"comm/{axis}_gb"] = moved / 1e9
    for name, held_by in (("peak", ranks.memory_peak), ("rss", ranks.rss)):
        if held_by.max:
            out[f"memory/{name}_gib"] = held_by.max / GIB
            out.update(_worst(f"memory/{name}_gib", held_by, ranks.ranks))
    return out


def _worst(name: str, spread: Spread, ranks: int) -> dict[str, float]:
    """The rank with the max that ``name`` shows, as ``time/max_forward_rank``; nothing where all have the same."""
    if ranks < 2 or spread.max == spread.min:
        return {}
    return {f"{name.rpartition('_')[0]}_rank": float(spread.max_rank)}


def finding_metrics(finding: Finding) -> dict[str, float]:
    """What a finding costs, in ms per step, as ``blame/rank_3_compute_ms``; 0 once it is over."""
    who = "_".join(map(str, finding.ranks[:2])) + ("_and_more" if len(finding.ranks) > 2 else "")
    name = "_".join(filter(None, (finding.kind, who, finding.phase.replace(" ", "_"))))
    return {f"blame/{name}_ms": 0.0 if finding.until is not None else 1e3 * finding.cost_s}


def _name(phase: str, prefix: str = "") -> str:
    """``time/forward_s``, ``comm/tp_s``, with a prefix ``time/max_forward_s``."""
    section, name = ("comm", phase[len(COMM) :]) if phase.startswith(COMM) else ("time", phase)
    return f"{section}/{prefix}{name}_s"
