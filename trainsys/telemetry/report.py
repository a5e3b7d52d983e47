"""The report at the end of a run, made from its files alone: it works on a killed run, on any machine."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console

from trainsys.rank_lists import rank_numbers
from trainsys.telemetry import text as say
from trainsys.telemetry.events import COMM, PHASES
from trainsys.telemetry.paper import Paper, Row
from trainsys.telemetry.run_data import RankData, RunData, Sums
from trainsys.telemetry.utilization import Utilization
from trainsys.terminal_text import SHOWN

WIDTH = 100
STATUS = {"done": "green", "stopped": "yellow", "failed": "bold red", "killed": "bold red"}
COLOURS = {
    "data": "yellow",
    "forward": "cyan",
    "backward": "blue",
    "optimizer": "green",
    "other": "bright_black",
}
CONVENTIONS = {
    "mfu": "causal attention, no recompute",
    "mfu_palm": "6N + 12LHQT a token (PaLM)",
    "hfu": "with recomputation",
}


def final_report(run: RunData, use: Utilization, console: Console | None = None) -> None:
    """Prints what a run's files tell. Plain ASCII where the output is no UTF-8 terminal."""
    page = _Page(Paper(console, WIDTH))
    page.title(run)
    page.facts(run, use)
    page.phases(run)
    page.gaps(run)


def summarize(run: RunData, use: Utilization) -> dict[str, Any]:
    """The report's numbers, for ``summary.json`` and sinks. Seconds, bytes, shares 0..1; None: unknown."""
    work, lead = _mean_work(run), run.lead
    return {
        "run_id": run.start.run_id,
        "status": run.status,
        "reason": run.reason,
        "steps": lead.steps,
        "first_step": run.start.first_step,
        "last_step": lead.last_step + 1,
        "steps_wanted": run.start.steps,
        "origin": run.start.origin,
        "loss_first": lead.first_loss,
        "loss_last": lead.last_loss if lead.last_loss is None or math.isfinite(lead.last_loss) else None,
        "loss_best": lead.best_loss,
        "tokens_per_s": tokens_per_s(run),
        "step_time_s": work.mean_s if work.steps else None,
        **use.shares,
        "peak_flops": use.peak_flops,
        "peak_label": use.peak_label,
        "peak_note": use.peak_note,
        "conventions": {**CONVENTIONS, **run.start.conventions},
        "memory_peak_bytes": max(r.peak_memory for r in run.ranks.values()),
        "rss_bytes": max(r.rss for r in run.ranks.values()),
        "phases_s": {name: s / work.steps for name, s in work.phases.items()} if work.steps else {},
        "stalls_s": lead.stalls,
        "wall_s": lead.seen_s - lead.began_s,
        "stepping_s": lead.stepping_s,
        "warmup_steps": lead.warmup,
        "attempts": lead.attempts,
        "world": run.start.world,
        "ranks_read": len(run.ranks),
    }


def tokens_per_s(run: RunData) -> float | None:
    """Real tokens a second over all ranks, after warm-up: the mean data rank's, times the data ranks."""
    rates = [r.work.tokens / r.work.seconds for r in run.ranks.values() if r.work.seconds > 0]
    if not rates:
        return None
    layout = run.start.layout
    data_ranks = layout.get("dp_replicate", 1) * layout.get("dp_shard", 1) if layout else run.start.world
    return math.fsum(rates) / len(rates) * data_ranks


def _by_rank(run: RunData) -> dict[int, Sums]:
    """What the phase table is made of: device time where every rank has it, else the host's."""
    on_device = all(r.device.steps for r in run.ranks.values())
    sums = {rank: r.device if on_device else r.work for rank, r in run.ranks.items()}
    return {rank: s for rank, s in sums.items() if s.steps}


def _mean_work(run: RunData) -> Sums:
    """The mean rank's step: each rank counts once, however many of its steps were read."""
    ranks = _by_rank(run)
    mean = Sums(steps=1 if ranks else 0)
    for sums in ranks.values():
        mean.seconds += sums.mean_s / len(ranks)
        for name, s in sums.phases.items():
            mean.phases[name] = mean.phases.get(name, 0.0) + s / sums.steps / len(ranks)
    return mean


class _Page:
    """One report on one console."""

    def __init__(self, paper: Paper) -> None:
        self._paper = paper

    def title(self, run: RunData) -> None:
        start, lead = run.start, run.lead
        layout = " × ".join(f"{axis}={n}" for axis, n in start.layout.items() if n > 1)
        world = f"{start.world} process{'es' * (start.world > 1)}"
        facts = [f for f in (start.model, layout, world, start.hardware or "", start.dtype) if f]
        ended = (
            f"{run.status} after {lead.steps:,} steps in {say.duration(max(0.0, lead.seen_s - lead.began_s))}"
        )
        if start.first_step and lead.steps:
            ended += f", at step {lead.last_step + 1:,}" + (f" of {start.steps:,}" if start.steps else "")
        self._paper.title(start.name or start.run_id)
        self._paper.line("  ·  ".join(facts), "dim")
        self._paper.line(ended, STATUS[run.status])
        for line in start.origin:
            self._paper.line(line)
        if run.reason:
            self._paper.line(run.reason, STATUS[run.status])
        self._paper.blank()

    def facts(self, run: RunData, use: Utilization) -> None:
        rows = [*self._loss(run.lead), *self._speed(run), *self._use(run, use), *self._memory(run)]
        self._paper.facts([*rows, ("time", *_time_account(run.lead))])

    def _loss(self, lead: RankData) -> list[tuple[str, str, str]]:
        if lead.last_loss is None:
            return []
        note = f"best {lead.best_loss:.4f}" if lead.best_loss is not None else "never finite"
        if lead.nonfinite_losses:
            note += f"; {lead.nonfinite_losses} steps were not finite"
        first = "nan" if lead.first_loss is None else f"{lead.first_loss:.4f}"
        return [("loss", f"{first} → {lead.last_loss:.4f}", note)]

    def _speed(self, run: RunData) -> list[tuple[str, str, str]]:
        work = run.lead.work
        speed = tokens_per_s(run)
        if speed is None:
            return []
        note = f"{say.duration(work.mean_s)} per step, standard deviation {say.duration(work.spread_s)}"
        padded = sum(r.work.padded for r in run.ranks.values())
        real = sum(r.work.tokens for r in run.ranks.values())
        if padded:
            note += f"; {100 * padded / (padded + real):.1f}% of all tokens were padding"
        return [("throughput", f"{say.count(speed)} tokens/s", note)]

    def _use(self, run: RunData, use: Utilization) -> list[tuple[str, str, str]]:
        start = run.start
        if use.mfu is None:
            why = "no peak is known for this hardware: trainsys bench matmul measures one"
            if start.peak_flops:
                why = "no step told its FLOPs"
            return [("mfu", "n/a", why)]
        rows = []
        for name, value in use.shares.items():
            if value is None:
                continue
            note = start.conventions.get(name, CONVENTIONS[name])
            if name == "mfu":
                note = f"of {use.peak_label or say.rate(use.peak_flops or 0.0) + ' a rank'}; {note}"
            rows.append((name, f"{100 * value:.1f}%", note))
        if use.peak_note:
            rows.append(("peak", say.rate(use.peak_flops or 0.0), use.peak_note))
        return rows

    def _memory(self, run: RunData) -> list[tuple[str, str, str]]:
        peaks = {rank: r.peak_memory for rank, r in run.ranks.items() if r.peak_memory}
        if not peaks:
            return []
        high, low = max(peaks, key=peaks.__getitem__), min(peaks, key=peaks.__getitem__)
        capacity = run.start.device_memory
        note = f"peak {'device' if capacity else 'resident'} memory of rank {high}"
        if capacity:
            note += f", {100 * peaks[high] / capacity:.0f}% of {say.size(capacity)}"
        if len(peaks) > 1:
            note += f" (least: rank {low}, {say.size(peaks[low])})"
        return [("memory", say.size(peaks[high]), note)]

    def phases(self, run: RunData) -> None:
        ranks = _by_rank(run)
        mean = _mean_work(run)
        if not ranks:
            self._paper.blank()
            self._paper.line("No step was finished: nothing to say about where time went.", "yellow")
            return
        steps = max(s.steps for s in ranks.values())
        clock = "device" if ranks[min(ranks)] is run.ranks[min(ranks)].device else "wall"
        self._paper.head(
            "Phases of a step",
            f"mean of {steps:,} steps on {len(ranks)} rank{'s' * (len(ranks) > 1)}, {clock} time;"
            f" {run.lead.warmup} warm-up steps left out",
        )
        names = sorted(mean.phases, key=_order)
        # A phase that took nothing is no line; "other" always is one, so that the sum is seen to be whole.
        names = [n for n in names if mean.phases[n] > 0 or n == "other"]
        shares = say.percents([max(0.0, mean.phases[n]) for n in names])
        longest = max(mean.phases[n] for n in names)

        def spread(seconds: dict[int, float]) -> list[str]:
            return [_range(seconds)] if len(ranks) > 1 else []

        rows = [
            Row(
                _label(name),
                [
                    _ms(mean.phases[name]), share,
                    *spread({r: s.phases.get(name, 0.0) / s.steps for r, s in ranks.items()}),
                ],
                mean.phases[name] / longest if longest > 0 else 0.0,
                "magenta" if name.startswith(COMM) else COLOURS.get(name, "white"),
            )
            for name, share in zip(names, shares, strict=True)
        ]  # fmt: skip
        rows.append(
            Row("step", [_ms(mean.seconds), "100.0%", *spread({r: s.mean_s for r, s in ranks.items()})], None, bold=True)
        )
        head = ["phase", "ms", "share"] + ["fastest to slowest rank, ms"] * (len(ranks) > 1)
        self._paper.bars(head, rows, 2)
        if any(name.startswith(COMM) for name in names):
            self._paper.line("* includes waiting for slower ranks; the waterfall below tells the two apart", "dim")
        self._paper.blank()

    def gaps(self, run: RunData) -> None:
        """What the files lack: the numbers above are worth that much less."""
        lines = []
        if run.missing:
            lines.append(
                f"{len(run.missing)} of {run.start.world} ranks left no events: {rank_numbers(run.missing)}"
            )
        no_end = [rank for rank, r in sorted(run.ranks.items()) if r.end is None]
        if no_end and run.status != "done":
            seen = max(r.seen_s for r in run.ranks.values())
            at = (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen)) if math.isfinite(seen) else "unknown"
            )
            lines.append(
                f"no last record from rank{'s' * (len(no_end) > 1)} {rank_numbers(no_end)} (killed, or running"
                f" still): last step {max(r.last_step for r in run.ranks.values()) + 1:,}, last sign of life {at}"
            )
        lines += [str(damage) for damage in run.damages]
        lost = sum(r.end.lost for r in run.ranks.values() if r.end)
        if lost:
            lines.append(f"{lost} records could not be written (disk full or stuck)")
        if run.lead.attempts > 1:
            lines.append(f"{run.lead.attempts} attempts are in these files; means are over all of them")
        for line in lines:
            self._paper.line(f"! {line}", "yellow", hang=4)
        if lines:
            self._paper.blank()


def _time_account(lead: RankData) -> tuple[str, str]:
    """Where the wall time went: training, and each pause; what is neither is said too."""
    wall = lead.seen_s - lead.began_s
    if not wall > 0:
        return "unknown", ""
    parts = {"training": lead.stepping_s, **dict(sorted(lead.stalls.items(), key=lambda kv: -kv[1]))}
    rest = wall - sum(parts.values())
    if rest > 0.001 * wall:
        parts["the rest"] = rest
    told = [f"{100 * s / wall:.1f}% {name}" for name, s in parts.items() if s >= SHOWN * wall]
    return say.duration(wall), ", ".join(told)


def _order(name: str) -> tuple[int, str]:
    if name == "other":
        return 9, name
    if name.startswith(COMM):
        return 5, name
    known = PHASES.index(name) if name in PHASES else 6
    return (min(known, 4), f"{known}{name}") if known < 5 else (7, name)


def _label(name: str) -> str:
    if name.startswith(COMM):
        return f"communication {name[len(COMM) :]}*"
    return {"gc": "garbage collection", "h2d": "copy to device"}.get(name, name)


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.{0 if ms >= 1000 else 1 if ms >= 10 else 2}f}"


def _range(values: dict[int, float]) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if _ms(values[low]) == _ms(values[high]):
        return f"{_ms(values[low]):>7} on every rank"
    return f"{_ms(values[low]):>7} (rank {low}) – {_ms(values[high])} (rank {high})"
