"""How often live blame accuses healthy ranks whose noise has a memory, and how long it takes to find slow ones.

    python profiling/blame_noise.py --runs 100 --out profiling/results/blame_noise.json

Runs of 200 windows (``telemetry.log_every`` steps each) through the watch that trains with a run
(``trainsys.profiler.live``): work of 100 ms with noise of 2% and of 5% in each window, which is independent, or has a
lag-1 correlation of 0.5, 0.8 or 0.95, or heavy tails (Student's t with 3 degrees), bursts (5% of the steps, half as long
again on average), or spells (a rank at a time 20% slower for about ten windows, a tenth of the time). A run is accused if
the watch names any rank. Detection: one rank slow by a constant share from window 60 on, noise of 2%; windows until it is
named. ``judged`` are single windows of 50 steps at 1,024 and 16,384 ranks, as ``explain`` judges them, and their time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from recorded import record  # noqa: E402

from trainsys.layout import Layout  # noqa: E402
from trainsys.profiler.live import LiveWatch  # noqa: E402
from trainsys.profiler.straggler import find_stragglers  # noqa: E402
from trainsys.profiler.verdict import ALPHA, TESTS, Verdict  # noqa: E402
from trainsys.telemetry.vectors import PLACE  # noqa: E402

Floats = npt.NDArray[np.float64]
WINDOWS, SLOW_FROM = 200, 60
KINDS = ("independent", "0.5", "0.8", "0.95", "heavy tails", "bursts", "spells")


def noise(rng: np.random.Generator, steps: int, ranks: int, kind: str, sd: float) -> Floats:
    """Log of the work over its usual value, [T, R]."""
    shape = (steps, ranks)
    if kind == "heavy tails":
        return np.asarray(sd * rng.standard_t(3, shape) / np.sqrt(3))
    if kind == "bursts":
        return np.asarray(rng.normal(0, sd, shape) + (rng.random(shape) < 0.05) * rng.exponential(0.5, shape))
    if kind == "spells":
        return np.asarray(rng.normal(0, sd, shape) + (drift(rng, steps, ranks, 0.9) > 1.3) * rng.exponential(0.2, shape))
    return sd * drift(rng, steps, ranks, 0.0 if kind == "independent" else float(kind))


def drift(rng: np.random.Generator, steps: int, ranks: int, rho: float) -> Floats:
    x = rng.normal(0, 1, (steps + 200, ranks))
    for i in range(1, len(x)):
        x[i] = rho * x[i - 1] + np.sqrt(1 - rho**2) * x[i]
    return np.asarray(x[200:])


def watched(work: Floats, hosts: Sequence[str] = ()) -> list[tuple[int, Verdict]]:
    """(window, verdict) that the watch says of ranks that all reduce at the end of each step; ``work`` [T, R] seconds."""
    found: list[tuple[int, Verdict]] = []
    now = 0
    layout = Layout(dp_shard=work.shape[1])
    watch = LiveWatch(layout, None, lambda v: found.append((now, v)), lambda *_: None, hosts=hosts)
    watch.close()  # the calls are made here, one after the other
    for now, row in enumerate(work):
        window = np.zeros((row.size, len(PLACE)))
        window[:, PLACE["step"]] = now
        window[:, PLACE["forward"]] = row
        window[:, PLACE["comm/fsdp"]] = row.max() - row + 0.01
        window[:, PLACE["step_time_s"]] = row.max() + 0.01
        watch.take(window, None)
    return found


def accused(ranks: int, kind: str, sd: float, runs: int) -> float:
    """Share of healthy runs in which somebody is named."""
    wrong = 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, ranks])
        wrong += bool(watched(0.1 * np.exp(noise(rng, WINDOWS, ranks, kind, sd))))
    return round(wrong / runs, 4)


def detection(ranks: int, kind: str, slow: float, runs: int) -> dict[str, float | None]:
    """Windows from the fault to its name, median and of nine in ten; None: that many were never named."""
    took, right = [], 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, ranks, 1])
        work = 0.1 * np.exp(noise(rng, WINDOWS, ranks, kind, 0.02))
        who = int(rng.integers(ranks))
        work[SLOW_FROM:, who] *= 1 + slow
        told = [(at, v) for at, v in watched(work) if v.kind == "rank" and v.news == "new"]
        right += all(v.ranks == (who,) for _, v in told)
        took.append(next((at - SLOW_FROM + 1 for at, v in told if v.ranks == (who,) and at >= SLOW_FROM), np.inf))
    median, most = np.quantile(np.array(took), [0.5, 0.9], method="higher")
    return {
        "named": round(float(np.isfinite(took).mean()), 3), "no_other_named": round(right / runs, 3),
        "median_windows": None if np.isinf(median) else float(median),
        "windows_of_nine_in_ten": None if np.isinf(most) else float(most),
    }  # fmt: skip


def judged(ranks: int, kind: str, sd: float, runs: int) -> dict[str, float]:
    wrong, took = 0, []
    for seed in range(runs):
        work = 0.1 * np.exp(noise(np.random.default_rng([seed, ranks]), 50, ranks, kind, sd))
        began = time.process_time()
        wrong += bool(find_stragglers(work, alpha=ALPHA / TESTS))
        took.append(time.process_time() - began)
    return {"accused": round(wrong / runs, 4), "median_ms": round(1e3 * float(np.median(took)), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--out")
    args = parser.parse_args()
    found: dict[str, Any] = {"runs": args.runs, "windows": WINDOWS, "accused": {}, "detection": {}, "judged": {}}
    for ranks in args.ranks:
        for kind in KINDS:
            each = {f"{100 * sd:.0f}%": accused(ranks, kind, sd, args.runs) for sd in (0.02, 0.05)}
            found["accused"][f"{ranks} ranks, {kind}"] = each
            print(ranks, kind, each, flush=True)
    for ranks in args.ranks:
        for kind in ("independent", "0.8", "0.95"):
            for slow in (0.05, 0.1, 0.2, 0.5):
                name = f"{ranks} ranks, {kind}, {100 * slow:.0f}% slow"
                found["detection"][name] = detection(ranks, kind, slow, max(20, args.runs // 4))
                print(name, found["detection"][name], flush=True)
    for ranks in (1024, 16384):
        for kind in KINDS:
            found["judged"][f"{ranks} ranks, {kind}"] = judged(ranks, kind, 0.02, max(10, args.runs // 10))
            print(ranks, kind, found["judged"][f"{ranks} ranks, {kind}"], flush=True)
    record(found, args.out)


if __name__ == "__main__":
    main()
