"""``trainsys plan backtest``: predict every row of a table of published runs and say how wrong that was.

Shipped constants are used as they are. With ``leave_out`` they are refitted for each source without its rows, which
is how development sources are judged; a source that the shipped constants have seen is marked otherwise.
"""

from __future__ import annotations

import json as jsonlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from trainsys.errors import UserError
from trainsys.planner import metrics
from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import DENSE, LOW, MOE, Constants, shipped, shipped_sources
from trainsys.planner.fill import at_best, fill
from trainsys.planner.from_runs import build
from trainsys.planner.measured import measured_seconds
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import MemoryConstants, shipped_memory
from trainsys.planner.metrics import Bools
from trainsys.planner.runs_csv import Refusal, Run, read
from trainsys.planner.step_time import step_time

Anchor = Literal["none", "one"]
# One run carries its own error, so its factor is trusted by this power: between-source error of about 10% against
# within-source error of about 8%. Over every choice of anchor in the development table 0.6 errs least.
ANCHOR_TRUST = 0.6
LAYOUT = (
    "dp", "zero_stage", "tp", "pp", "vpp", "cp", "ep", "micro_batch", "sp", "fsdp", "schedule", "recompute",
    "attention_kernel", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """Predictions of the rows used; all arrays in their order. ``scored``: not an anchor."""

    runs: list[Run]
    cases: Cases
    seconds: Array
    memory: Array
    called_oom: Bools
    measured: Array
    measured_memory: Array
    oom: Bools
    scored: Bools
    refused: list[Refusal]


def group_key(run: Run) -> Hashable:
    """One model, cluster and batch, as one publication ran them."""
    shape = tuple(
        run.num[n] for n in ("n_layers", "d_model", "n_heads", "d_ff", "vocab", "seq_len", "moe_n_experts")
    )
    shape = tuple(-1.0 if v != v else v for v in shape)
    return (run.source, shape, run.text["gpu"], run.num["n_gpus"], run.text["dtype"], run.num["global_batch"])


def layout_key(run: Run) -> Hashable:
    cells = [run.num.get(c, run.text.get(c, run.flag.get(c))) for c in LAYOUT]
    return tuple(None if c != c else c for c in cells)


def anchor_key(run: Run) -> Hashable:
    """Runs that one anchor serves: the same model on the same cluster type and dtype, by the same people."""
    shape = tuple(run.num[n] for n in ("d_model", "n_heads", "d_ff", "vocab", "moe_n_experts"))
    return (run.source, tuple(-1.0 if v != v else v for v in shape), run.text["gpu"], run.text["dtype"])


def anchored(runs: Sequence[Run], seconds: Array, measured: Array) -> tuple[Array, Bools]:
    """(predictions scaled by one measured run of each anchor group, which rows are no anchors).

    The anchor is the row of median predicted time, chosen without looking at what was measured. A group of one row
    keeps its prediction and is scored unanchored.
    """
    out, scored = seconds.copy(), np.ones(len(seconds), bool)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        if np.isfinite(measured[i]):
            members[anchor_key(run)].append(i)
    scale: dict[Hashable, float] = {}
    for key, rows in members.items():
        if len(rows) < 2:
            continue
        anchor = sorted(rows, key=lambda i: float(seconds[i]))[len(rows) // 2]
        scale[key] = float(measured[anchor] / seconds[anchor]) ** ANCHOR_TRUST
        scored[anchor] = False
    for i, run in enumerate(runs):
        out[i] *= scale.get(anchor_key(run), 1.0)
    return out, scored


def predict(
    runs: Sequence[Run],
    anchor: Anchor = "none",
    by_source: dict[str, tuple[Constants, MemoryConstants]] | None = None,
) -> Predictions:
    """``by_source``: constants for rows of a source; the shipped ones for the others.

    Raises:
        UserError: no row can be used.
    """
    cases, kept, refused = build(runs)
    if cases is None:
        reasons = Counter(r.reason for r in refused).most_common(3)
        raise UserError(
            f"none of {len(refused)} rows can be used: " + "; ".join(f"{n} x {r}" for r, n in reasons)
        )
    n = len(kept)
    seconds, memory, called = np.empty(n), np.empty(n), np.zeros(n, bool)
    filled: dict[str, Array] = {}
    sources = np.asarray([r.source for r in kept])
    for source in np.unique(sources):
        rows = np.flatnonzero(sources == source)
        k, m = (by_source or {}).get(str(source), (None, None))
        k, m = k or shipped(), m or shipped_memory()
        part = fill(cases.take(rows), [kept[i] for i in rows], k, m)
        seconds[rows] = step_time(part, k).total
        peak = peak_memory(part, m)
        memory[rows] = peak.total
        least = at_best(part, [kept[i] for i in rows])
        called[rows] = ~peak_memory(least, m).fits(least, m)
        for name in ("micro_batch", "vpp", "recompute", "schedule", "fsdp_shard"):
            filled.setdefault(name, np.array(getattr(cases, name), float))[rows] = getattr(part, name)
    cases = cases.replace(**dict(filled))
    measured = measured_seconds(cases, kept)
    peak_gb = np.asarray([np.nan if r.oom else r.n("peak_mem_gb") for r in kept])
    scored = np.ones(n, bool)
    if anchor == "one":
        seconds, scored = anchored(kept, seconds, measured)
    oom = np.asarray([r.oom for r in kept])
    return Predictions(kept, cases, seconds, memory, called, measured, peak_gb * 1e9, oom, scored, refused)


def _score(p: Predictions, rows: Bools, refused: Sequence[Refusal]) -> dict[str, Any]:
    timed = rows & np.isfinite(p.measured) & p.scored
    sized = rows & np.isfinite(p.measured_memory)
    known = rows & (p.oom | np.isfinite(p.measured))
    index = np.flatnonzero(rows)
    groups = metrics.score_groups(
        [group_key(p.runs[i]) for i in index],
        [layout_key(p.runs[i]) for i in index],
        p.seconds[index], p.measured[index], p.oom[index], p.called_oom[index], p.memory[index],
    )  # fmt: skip
    rho = [g.spearman for g in groups if np.isfinite(g.spearman)]
    regret = [g.regret for g in groups]

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if len(values) else None

    def clean(value: float) -> float | None:
        return value if np.isfinite(value) else None

    reasons = Counter(r.reason for r in refused)
    return {
        "rows": int(rows.sum()) + len(refused),
        "used": int(rows.sum()),
        "refused": len(refused),
        "refused_layout_known": sum(r.layout_known for r in refused),
        "refused_reasons": dict(reasons.most_common()),
        "timed": int(timed.sum()),
        "mape_pct": clean(metrics.mape(p.seconds[timed], p.measured[timed])),
        "median_error_pct": clean(metrics.median_error(p.seconds[timed], p.measured[timed])),
        "groups": len(groups),
        "spearman": mean(rho),
        "regret_mean_pct": mean(regret),
        "regret_max_pct": max(regret) if regret else None,
        "first_pick_oom_pct": mean([100.0 * g.pick_oom for g in groups]),
        "oom_rows": int((known & p.oom).sum()),
        "oom_balanced_accuracy_pct": clean(metrics.balanced_accuracy(p.called_oom[known], p.oom[known])),
        "ran_called_oom_pct": clean(
            100.0 * float(np.mean(p.called_oom[known & ~p.oom])) if (known & ~p.oom).any() else float("nan")
        ),
        "memory_rows": int(sized.sum()),
        "memory_mape_pct": clean(metrics.mape(p.memory[sized], p.measured_memory[sized])),
    }


def slices(p: Predictions) -> dict[str, Bools]:
    """The cuts that the targets are set for."""
    gpu = np.asarray([r.text["gpu"].upper() for r in p.runs])
    dense = np.broadcast_to(p.cases.n_experts == 0, gpu.shape)
    ah = np.asarray([g.startswith(("A100", "A800", "H100", "H200", "H800")) for g in gpu])
    low = np.broadcast_to(p.cases.fp8 > 0, gpu.shape)
    black = np.asarray([("B200" in g or "B300" in g) for g in gpu])
    ok = np.asarray([r.text["quality"] in ("", "ok") for r in p.runs])
    return {
        DENSE: dense & ah & ~low & ok,
        LOW: dense & (low | black),
        MOE: ~dense,
        "fully sharded (FSDP)": np.broadcast_to(p.cases.zero >= 3, gpu.shape) & dense & ok,
    }


def _slice(p: Predictions, rows: Bools, sources: NDArray[np.str_]) -> dict[str, Any]:
    """Scores of a cut, with the mean of its sources' errors: one large sweep may hold most of its rows."""
    of = [_score(p, rows & (sources == n), [])["mape_pct"] for n in np.unique(sources[rows])]
    known = [v for v in of if v is not None]
    return _score(p, rows, []) | {"mape_mean_of_sources_pct": float(np.mean(known)) if known else None}


def report(p: Predictions, anchor: str, fitted_on: Sequence[str]) -> dict[str, Any]:
    """Scores by source, by slice and overall, as plain data."""
    sources = np.asarray([r.source for r in p.runs])
    refused: dict[str, list[Refusal]] = defaultdict(list)
    for r in p.refused:
        refused[r.run.source].append(r)
    names = sorted({*sources.tolist(), *refused})
    everything = np.ones(len(p.runs), bool)
    by_source = {n: _score(p, sources == n, refused[n]) for n in names}
    mapes = [s["mape_pct"] for s in by_source.values() if s["mape_pct"] is not None]
    return {
        "anchor": anchor,
        "constants_fitted_on": sorted(set(fitted_on) & set(names)),
        "overall": _score(p, everything, p.refused)
        | {"mape_mean_of_sources_pct": float(np.mean(mapes)) if mapes else None},
        "slices": {n: _slice(p, rows, sources) for n, rows in slices(p).items() if rows.any()},
        "sources": by_source,
    }


def _print(data: dict[str, Any], console: Console) -> None:
    table = Table(title=f"back-test, anchor {data['anchor']}", caption="percent but for Spearman and counts")
    columns = (
        ("used", "used"), ("refused", "refused"), ("timed", "timed"), ("MAPE", "mape_pct"),
        ("median", "median_error_pct"), ("groups", "groups"), ("Spearman", "spearman"),
        ("regret", "regret_mean_pct"), ("max", "regret_max_pct"), ("pick OOM", "first_pick_oom_pct"),
        ("OOM bal. acc.", "oom_balanced_accuracy_pct"), ("ran, called OOM", "ran_called_oom_pct"),
        ("memory err.", "memory_mape_pct"),
    )  # fmt: skip
    table.add_column("source")
    for title, _ in columns:
        table.add_column(title, justify="right")

    def row(name: str, s: dict[str, Any]) -> None:
        cells = []
        for _, key in columns:
            v = s[key]
            cells.append(
                "-"
                if v is None
                else f"{v:.2f}"
                if key == "spearman"
                else f"{v:.1f}"
                if isinstance(v, float)
                else str(v)
            )
        table.add_row(name, *cells)

    for name, s in data["sources"].items():
        row(name, s)
    table.add_section()
    for name, s in data["slices"].items():
        row(name, s)
    table.add_section()
    row("overall", data["overall"])
    console.print(table)
    for name, s in data["sources"].items():
        for reason, count in s["refused_reasons"].items():
            console.print(f"refused {count} of {name}: {reason}", highlight=False)
    if data["constants_fitted_on"]:
        console.print(
            f"the shipped constants have seen: {', '.join(data['constants_fitted_on'])} (use --leave-out)"
        )


def run(
    csv: str | Path,
    anchor: str = "none",
    json: bool = False,
    leave_out: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """The command: read, predict, print (or JSON on standard output), and return the scores.

    Raises:
        UserError: unreadable table, unknown anchor, or no usable row.
    """
    if anchor not in ("none", "one"):
        raise UserError(f"--anchor {anchor}: none or one")
    runs = read(csv)
    by_source = None
    if leave_out:
        from trainsys.planner.calibrate import leave_one_out

        by_source = leave_one_out(runs)
    p = predict(runs, "one" if anchor == "one" else "none", by_source)
    data = report(p, anchor, () if leave_out else shipped_sources())
    data["leave_one_source_out"] = leave_out
    if json:
        print(jsonlib.dumps(data, indent=1))
    else:
        _print(data, console or Console(width=200))
    return data
