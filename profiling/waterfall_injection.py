"""Does each term of the waterfall hold what was put into it? Known times injected into real gloo ranks.

    python profiling/waterfall_injection.py --repeats 5 --out profiling/results/waterfall_injection.json

Compute sleeps (tests/support/standin.py), the recorder, the collectives and the ranks are real. The first half of a
run is without the fault. What was injected is measured where it is injected; what the term gained is the difference
of its medians over the halves' steps. Of each half the quicker half of its steps counts: a shared machine stops for
some, and a sleep then lasts twice as long as it was asked to, in one rank and not in another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.ranks import run_ranks  # noqa: E402
from support.standin import Fault, Standin, run  # noqa: E402
from trainsys.layout import Layout  # noqa: E402
from trainsys.profiler.flops_split import split_flops  # noqa: E402
from trainsys.profiler.run_steps import load_steps  # noqa: E402
from trainsys.profiler.steps import StepTable  # noqa: E402
from trainsys.profiler.waterfall import Work, seconds_by_term  # noqa: E402

LAYOUT = (("dp_shard", 2), ("tp", 2))
STEPS = 60
HALF = STEPS // 2
WARM = 5
LONG = Standin(LAYOUT, steps=HALF, forward_s=0.016, backward_s=0.032)
"""Compute that is long beside what each sleep lasts longer than it should, which does not grow with its length."""
CASES: dict[str, tuple[Fault, str]] = {
    "sleep in data loading": (Fault("data", 0.040, first=HALF), "data"),
    "sleep in one rank's forward": (Fault("forward", 0.030, ranks=(1,), first=HALF), "straggler"),
    "sleep in the optimizer": (Fault("optimizer", 0.040, first=HALF), "optimizer"),
    "sleep in a save": (Fault("save", 0.050, first=HALF), "stall/checkpoint"),
    "throttled link on tp": (Fault("link", 0.030, axis="tp", first=HALF), "comm/tp"),
    "throttled link on fsdp": (Fault("link", 0.030, axis="fsdp", first=HALF), "comm/fsdp"),
}


def one(spec: Standin) -> tuple[StepTable, list[dict[str, list[float]]]]:
    with tempfile.TemporaryDirectory() as folder:
        told = run_ranks(4, run, spec, folder, timeout_s=300)
        return load_steps(folder), told


def quick(table: StepTable, rows: Any) -> Any:
    """Those of ``rows`` whose step took less than their median."""
    took = table.time.mean(axis=1)[rows] + sum(stall.mean(axis=1)[rows] for stall in table.stalls.values())
    return np.flatnonzero(rows)[took <= np.median(took)]


def terms(table: StepTable, work: Work | None = None) -> dict[str, Any]:
    """Term -> seconds by step, mean over ranks."""
    parts = seconds_by_term(table, work or split_flops(table, None))
    return {name: values.mean(axis=1) for name, values in parts.items()}


def fault(name: str, seed: int) -> dict[str, float]:
    put, term = CASES[name]
    table, told = one(Standin(LAYOUT, steps=STEPS, seed=seed, faults=(put,)))
    rows = np.arange(len(table.steps))
    before, after = quick(table, (rows >= WARM) & (rows < HALF)), quick(table, rows >= HALF)
    without, found = (
        float(np.median(terms(table.select(chosen)).get(term, np.zeros(1))))
        for chosen in (before, after)
    )
    if put.kind == "link":
        each = link_s(told, put.axis)
    else:
        injected = np.array([rank[put.kind] for rank in told])[:, HALF:]
        # All ranks lose what one slow rank loses; a fault on all costs their mean.
        each = injected.max(axis=0) if put.ranks else injected.mean(axis=0)
    return {"injected_s": float(np.median(each[after - HALF])), "gained_s": found - without}


def link_s(told: list[dict[str, list[float]]], axis: str) -> Any:
    """Seconds of each step: a collective is over when the last of its group has slept, mean over groups."""
    calls = sum(name.startswith("link/") for name in told[0])
    slept = np.array([[rank[f"link/{call}"][-HALF:] for rank in told] for call in range(calls)])
    groups = Layout(**dict(LAYOUT)).groups(axis)
    return np.mean([slept[:, list(group)].max(axis=1).sum(axis=0) for group in groups], axis=0)


def recomputation(seed: int, timed: bool) -> dict[str, float]:
    spec = replace(LONG, seed=seed, recompute_share=0.8, timed_recompute=timed)
    table, told = one(spec)
    chosen = quick(table, np.arange(len(table.steps)) >= WARM)
    work = Work(np.zeros(len(table.steps)), np.full(len(table.steps), 0.8e6), spec.recompute_share)
    injected = np.mean([rank["recompute"] for rank in told], axis=0)[chosen]
    gained = terms(table, work)["recompute"][chosen]
    return {"injected_s": float(np.median(injected)), "gained_s": float(np.median(gained))}


def padding(seed: int) -> dict[str, float]:
    """The same real tokens, alone and with 40% of padding beside them."""
    padded = replace(LONG, seed=seed, padded_share=0.4)
    alone = replace(
        padded, padded_share=0.0, forward_s=0.6 * padded.forward_s, backward_s=0.6 * padded.backward_s
    )
    both = []
    for spec in (alone, padded):
        table, _ = one(spec)
        chosen = quick(table, np.arange(len(table.steps)) >= WARM)
        compute = (table.phases["forward"] + table.phases["backward"]).mean(axis=1)[chosen]
        both.append((float(np.median(compute)), terms(table), chosen))
    (short, _, _), (long, parts, chosen) = both
    return {"injected_s": long - short, "gained_s": float(np.median(parts["padding"][chosen]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this; the others stay as they are in --out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    there = args.out and args.out.exists()
    results: dict[str, Any] = json.loads(args.out.read_text())["cases"] if there and args.only else {}
    for name in (*CASES, "recomputation on", "recomputation on, a phase of its own", "padded batch"):
        if args.only not in name:
            continue
        trials = []
        for seed in range(args.repeats):
            if name in CASES:
                trials.append(fault(name, seed))
            else:
                timed = name.endswith("own")
                trials.append(recomputation(seed, timed) if name.startswith("recompute") else padding(seed))
        ratio = [t["gained_s"] / t["injected_s"] for t in trials]
        middle = float(np.median(ratio))
        results[name] = {
            "injected_ms": round(1e3 * float(np.median([t["injected_s"] for t in trials])), 2),
            "gained_ms": round(1e3 * float(np.median([t["gained_s"] for t in trials])), 2),
            "ratio": round(middle, 4), "ratios": [round(r, 3) for r in ratio], "within_5pct": abs(middle - 1) <= 0.05,
        }  # fmt: skip
        print(f"{name:38} {json.dumps(results[name])}", flush=True)
    note = {"load_average": os.getloadavg(), "cores": len(os.sched_getaffinity(0)), "repeats": args.repeats}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**note, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
