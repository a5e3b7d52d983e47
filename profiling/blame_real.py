"""Real faults in real runs, no sleeps: does blame name the right rank or link, why, since when, and at what cost?

    python profiling/blame_real.py --runs 40 --healthy 20 [--busy] [--resume] [--minutes 30] [--only FAULT ...] [--out F]

Each run is ``trainsys train``, two to four processes with gloo and a tiny model. From some step on (for good, for a
while, on and off, or from the first) something is done to one of them from outside, or by a thread of its own
(``real_faults``). Every other run, healthy ones too, shares the machine with a process that has nothing to do with it;
with ``--busy`` all do. Judged are what live blame said and what ``explain`` says afterwards (``real_run``). A seed
decides all of a run; a line per run is appended to the JSON lines beside ``--out``, from which ``--resume`` goes on.
Needs root for quotas, links and reads; a fault that this machine cannot have is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "profiling")]

from real_faults import FAULTS, why_not  # noqa: E402
from real_run import LAYOUTS, WHEN, Seen, make_tokens, train  # noqa: E402
from recorded import record  # noqa: E402

LEAST_EFFECT = 0.03
"""Of the median step, that a fault has to cost."""


def plan(runs: int, healthy: int, faults: list[str]) -> list[str]:
    """The fault of each run, healthy ones spread among the others so that any beginning has both."""
    total = runs + healthy
    without = {i * total // healthy for i in range(healthy)}
    turn = iter(faults[i % len(faults)] for i in range(runs))
    return ["none" if i in without else next(turn) for i in range(total)]


def rates(told: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of each quantity how many were right, and of how many."""
    told = list(told)
    named = [t for t in told if t["named"]]
    onsets, ends = [abs(t["onset"]) for t in named], [t["end"] for t in named if "end" in t]
    costs = [t["cost"] for t in named if "cost" in t]
    return {
        "named": [len(named), len(told)],
        "right cause": [sum(t["cause"] for t in named), len(told)],
        "others accused too": [sum(t["wrong"] > 0 for t in told), len(told)],
        "onset within 10 steps": [sum(n <= 10 for n in onsets), len(onsets)],
        "end within 10 steps": [sum(n is not None and abs(n) <= 10 for n in ends), len(ends)],
        "cost within 25%": [sum(0.75 <= c <= 1.25 for c in costs), len(costs)],
    }


def summary(seen: list[Seen]) -> dict[str, Any]:
    done = [s for s in seen if not s.problem]
    healthy = [s for s in done if s.fault == "none"]
    # Of a fault that cost nothing there is nothing to say: a slow link that overlap hides, reads that prefetching does.
    idle = [
        s
        for s in done
        if s.fault != "none" and s.true_ms < LEAST_EFFECT * s.step_ms and s.when != "from the start"
    ]
    faulty = [s for s in done if s.fault != "none" and s not in idle]
    views: dict[str, Callable[[Seen], dict[str, Any]]] = {
        "live": lambda s: s.live,
        "after": lambda s: s.after,
    }

    def both(some: list[Seen]) -> dict[str, Any]:
        return {name: rates(map(view, some)) for name, view in views.items()}

    def accused(some: list[Seen]) -> dict[str, Any]:
        wrong = {f"accused {name}": sum(view(s)["wrong"] > 0 for s in some) for name, view in views.items()}
        slow = {f"run called slow {name}": sum(view(s)["run"] for s in some) for name, view in views.items()}
        return {"runs": len(some)} | wrong | slow

    def by(values: Iterable[str], name: str) -> dict[str, Any]:
        groups = {value: [s for s in faulty if getattr(s, name) == value] for value in values}
        return {value: both(some) for value, some in groups.items() if some}

    return {
        "runs": len(seen), "failed": sum(bool(s.problem) for s in seen), "cores": os.cpu_count(),
        "without effect": len(idle),
        "healthy": {
            "quiet": accused([s for s in healthy if not s.busy]), "busy": accused([s for s in healthy if s.busy]),
        },
        "faulty": both(faulty),
        "quiet machine": both([s for s in faulty if not s.busy]),
        "by fault": by(FAULTS, "fault"), "by layout": by(LAYOUTS, "layout"), "by time": by(WHEN, "when"),
    }  # fmt: skip


def show(number: int, s: Seen) -> None:
    told = (
        s.problem or f"{s.step_ms:.0f} {s.true_ms:+.1f} ms in steps {s.steps}; live {s.live}; after {s.after}"
    )
    print(
        f"{number:3d} {s.fault} of rank {s.rank}, {s.layout}, {s.when}{', busy' if s.busy else ''}: {told}",
        flush=True,
    )
    for text in s.said:
        print("      " + text[:230], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=16, help="with a fault")
    parser.add_argument("--healthy", type=int, default=8, help="without one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--busy", action="store_true", help="share the machine in all runs, not in every other one"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--only", nargs="+", choices=[f for f in FAULTS if f != "none"], metavar="FAULT")
    parser.add_argument("--resume", action="store_true", help="go on after what the lines beside --out hold")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the records of the runs, to explain them again"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/blame_real_faults.json")
    args = parser.parse_args()
    wanted = args.only or [f for f in FAULTS if f != "none"]
    cannot = {fault: why for fault in wanted if (why := why_not(fault))}
    for fault, why in cannot.items():
        print(f"left out: {fault}: {why}", flush=True)
    faults = [fault for fault in wanted if fault not in cannot]
    if args.runs and not faults:
        parser.error("none of the faults asked for can be had here; ask for others, or --runs 0")
    lines = args.out.with_suffix(".jsonl")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seen = []
    if args.resume and lines.exists():
        seen = [Seen(**json.loads(line)) for line in lines.read_text().splitlines()]
    else:
        lines.unlink(missing_ok=True)
    end = time.monotonic() + 60 * args.minutes
    shard = None
    with ExitStack() as stack:
        for number, fault in list(enumerate(plan(args.runs, args.healthy, faults)))[len(seen) :]:
            if time.monotonic() > end:
                break
            if fault == "data" and shard is None:
                shard = make_tokens(
                    Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blame-real-")))
                )
            seed = 1000 * args.seed + number
            busy = args.busy or len([s for s in seen if (s.fault == "none") == (fault == "none")]) % 2 == 1
            seen.append(train(seed, fault, busy, shard if fault == "data" else None, args.keep))
            with lines.open("a") as file:
                file.write(json.dumps(asdict(seen[-1])) + "\n")
            show(number, seen[-1])
    record(summary(seen), args.out)
    return int(all(s.problem for s in seen) and bool(seen))


if __name__ == "__main__":
    sys.exit(main())
