"""Does each term of the waterfall hold what was put into it? Known times injected into real gloo ranks.

    python profiling/waterfall_injection.py --repeats 5 --out profiling/results/waterfall_injection.json

Compute sleeps (tests/support/standin.py), the recorder, the collectives and the ranks are real. The first half of a
run is without the fault. What was injected is measured where it is injected; what the term gained is the difference
of its medians over the halves' steps. On a busy machine both halves are noisy: the load is in the results.
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
from trainsys.profiler.flops_split import split_flops  # noqa: E402
from trainsys.profiler.steps import StepTable, load_steps  # noqa: E402
from trainsys.profiler.waterfall import Work, seconds_by_term  # noqa: E402
from trainsys.telemetry.run_data import load_run  # noqa: E402

LAYOUT = (("dp_shard", 2), ("tp", 2))
STEPS = 60
HALF = STEPS // 2
CASES: dict[str, tuple[Fault, str]] = {
    "sleep in data loading": (Fault("data", 0.040, first=HALF), "data"),
    "sleep in one rank's forward": (Fault("forward", 0.030, ranks=(1,), first=HALF), "straggler"),
    "sleep in the optimizer": (Fault("optimizer", 0.040, first=HALF), "optimizer"),
    "sleep in a save": (Fault("save", 0.050, first=HALF), "stall/checkpoint"),
    "throttled link on tp": (Fault("link", 0.015, axis="tp", first=HALF), "comm/tp"),
    "throttled link on fsdp": (Fault("link", 0.015, axis="fsdp", first=HALF), "comm/fsdp"),
}


def one(spec: Standin) -> tuple[StepTable, list[dict[str, list[float]]], float | None]:
    with tempfile.TemporaryDirectory() as folder:
        told = run_ranks(4, run, spec, folder, timeout_s=300)
        start = load_run(folder)
        return load_steps(folder, start.start, start.ranks), told, start.start.peak_flops


def terms(table: StepTable, peak: float | None, work: Work | None = None) -> dict[str, Any]:
    """Term -> seconds by step, mean over ranks."""
    parts = seconds_by_term(table, peak, work or split_flops(table, None))
    return {name: values.mean(axis=1) for name, values in parts.items()}


def fault(name: str, seed: int) -> dict[str, float]:
    put, term = CASES[name]
    table, told, peak = one(Standin(LAYOUT, steps=STEPS, seed=seed, faults=(put,)))
    found = {}
    rows = np.arange(len(table.steps))
    for half, chosen in (("without", (rows >= 5) & (rows < HALF)), ("with", rows >= HALF)):
        parts = terms(table.select(np.flatnonzero(chosen)), peak)
        found[half] = float(np.median(parts.get(term, np.zeros(1))))
    injected = np.array([rank[put.kind] for rank in told])[:, HALF:]
    # One slow rank costs everyone all of its own; a fault on all costs their mean.
    each = injected.max(axis=0) if put.ranks else injected.mean(axis=0)
    return {"injected_s": float(np.median(each)), "gained_s": found["with"] - found["without"]}


def recomputation(seed: int, timed: bool) -> dict[str, float]:
    spec = Standin(LAYOUT, steps=HALF, seed=seed, recompute_share=0.8, timed_recompute=timed, forward_s=0.008)
    table, told, peak = one(spec)
    work = Work(np.zeros(len(table.steps)), np.full(len(table.steps), 0.8e6), spec.recompute_share)
    injected = np.median(np.mean([rank["recompute"] for rank in told], axis=0)[5:])
    return {"injected_s": float(injected), "gained_s": float(np.median(terms(table, peak, work)["recompute"][5:]))}


def padding(seed: int) -> dict[str, float]:
    """The same real tokens, alone and with 40% of padding beside them."""
    padded = Standin(LAYOUT, steps=HALF, seed=seed, padded_share=0.4, forward_s=0.008, backward_s=0.016)
    alone = replace(padded, padded_share=0.0, forward_s=0.6 * padded.forward_s, backward_s=0.6 * padded.backward_s)
    both = []
    for spec in (alone, padded):
        table, _, peak = one(spec)
        compute = (table.phases["forward"] + table.phases["backward"]).mean(axis=1)
        both.append((float(np.median(compute[5:])), terms(table, peak)))
    (short, _), (long, parts) = both
    return {"injected_s": long - short, "gained_s": float(np.median(parts["padding"][5:]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in (*CASES, "recomputation on", "recomputation on, a phase of its own", "padded batch"):
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
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps({**note, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
