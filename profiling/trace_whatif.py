"""Is what a trace's what-ifs promise true? Generated programs, run again with the change.

    python profiling/trace_whatif.py [--seeds 200] [--out profiling/results/trace_whatif.json]

Each seed is a training step of one of nine scenarios (tests/support/whatif): a host that launches onto streams and
waits in one of the ways that programs wait. Its trace is written as a file, read back, and every what-if compared
with a second run of the same program in which exactly that was changed. A what-if is right if the time it saves is
within 10% of the true saving, or, where both are small, within half a percent of the trace.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from support.whatif.machine import Change  # noqa: E402
from support.whatif.machine import run as play  # noqa: E402
from support.whatif.programs import SCENARIOS, program  # noqa: E402
from support.whatif.recording import write  # noqa: E402
from trainsys.profiler.trace.analyse import Options, load  # noqa: E402
from trainsys.profiler.trace.critical import critical_path  # noqa: E402

CHANGES = {
    "communication took no time": Change(comm=0.0),
    "copies took no time": Change(copy=0.0),
    "the data loader never made anyone wait": Change(loader=0.0),
    "the host were twice as fast": Change(host=0.5),
    "the host never waited for the device": Change(waits=False),
    "matmuls were 20% faster": Change(matmul=5 / 6),
    "other kernels took half the time (fusion)": Change(compute=0.5),
}
SMALL, CLOSE = 0.005, 0.10
"""Shares of the trace, and of the true saving."""


@dataclass(frozen=True)
class Asked:
    """One what-if of one trace. Shares of the trace; ``said`` None where it was withheld."""

    scenario: str
    seed: int
    what: str
    true: float
    said: float | None
    why: str = ""

    @property
    def right(self) -> bool:
        return self.said is not None and abs(self.said - self.true) <= max(SMALL, CLOSE * abs(self.true))

    @property
    def matters(self) -> bool:
        """The true saving is large enough for 10% of it to be more than rounding and jitter."""
        return abs(self.true) >= SMALL


def ask(scenario: str, seed: int) -> tuple[list[Asked], dict[str, float]]:
    """The what-ifs of one generated trace, and shares of its critical path by what held it."""
    rng = np.random.default_rng((seed, 5))
    drawn = program(scenario, seed)
    base = play(drawn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank0.json"
        write(
            base,
            path,
            lost=float(rng.choice([0, 0, 0.01, 0.03])),
            operators=bool(rng.random() < 0.7),
            seed=seed,
        )
        loaded = load(path, Options())
    found = critical_path(loaded.trace, loaded.kinds, loaded.launches)
    assert found is not None
    assert found.span_ns == base.span
    said = {w.what: w.saved_ns / base.span for w in found.what_if}
    why = found.withheld
    out = []
    for what, change in CHANGES.items():
        if what in said or what in why:
            true = 1 - play(drawn, change).span / base.span
            out.append(Asked(scenario, seed, what, true, said.get(what), why.get(what, "")))
    return out, {k: v / base.span for k, v in found.by_kind.items()}


def summary(asked: list[Asked]) -> dict[str, object]:
    given = [a for a in asked if a.said is not None]
    large = [a for a in given if a.matters]
    error = np.array([abs((a.said or 0.0) - a.true) / abs(a.true) for a in large])
    return {
        "asked": len(asked),
        "withheld": len(asked) - len(given),
        "given": len(given),
        "right": sum(a.right for a in given),
        "saving_of_half_a_percent_or_more": len(large),
        "of_these_within_10_percent_of_it": int((error <= CLOSE).sum()),
        "median_error_of_the_saving": round(float(np.median(error)), 4) if large else None,
        "worst_error_in_share_of_the_trace": round(
            max((abs(a.said - a.true) for a in given), default=0.0), 4
        ),
    }


def one(seed: int) -> list[Asked]:
    return ask(SCENARIOS[seed % len(SCENARIOS)], seed)[0]


def run(seeds: int, workers: int = 1) -> dict[str, object]:
    with ProcessPoolExecutor(workers) as pool:
        asked = [a for found in pool.map(one, range(seeds)) for a in found]
    return {
        "traces": seeds,
        "all": summary(asked),
        "by_scenario": {s: summary([a for a in asked if a.scenario == s]) for s in SCENARIOS},
        "by_change": {w: summary([a for a in asked if a.what == w]) for w in CHANGES},
        "withheld_because": Counter(re.sub(r"[0-9.]+%", "x%", a.why) for a in asked if a.said is None),
        "worst": [
            f"{a.scenario} {a.seed}: {a.what}: said {a.said:.4f}, true {a.true:.4f}"
            for a in sorted(asked, key=lambda a: -abs(a.said - a.true) if a.said is not None else 0.0)[:10]
            if a.said is not None
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = json.dumps(run(args.seeds, args.workers), indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
