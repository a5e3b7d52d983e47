"""Does blame name the right rank and the right cause? Faults put into real runs, and into simulations of 10,000 ranks.

    python profiling/blame_injection.py real --runs 200 --out profiling/results/blame_real.json
    python profiling/blame_injection.py real --runs 100 --only none --first-seed 9000 --out …  # the same file goes on
    python profiling/blame_injection.py simulated --ranks 10000 --runs 200

Real runs: 2 to 8 gloo ranks with real collectives and the real recorder; compute sleeps (tests/support/standin.py).
A run is right if exactly the injected fault is named: kind, ranks and phase; without a fault, if nothing is named.
A file that is there goes on: seeds it holds are not run again, and ``--minutes`` ends a chunk early.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from trainsys.layout import Layout  # noqa: E402
from trainsys.profiler.blame import find_blame, judge_window  # noqa: E402
from trainsys.profiler.links import own_time  # noqa: E402
from trainsys.profiler.run_steps import load_steps  # noqa: E402
from trainsys.profiler.steps import StepTable  # noqa: E402

KINDS = ("compute", "data", "link", "gc", "none")
LAYOUTS = (
    (("dp_shard", 2),), (("tp", 2),), (("dp_shard", 4),), (("dp_shard", 2), ("tp", 2)),
    (("dp_shard", 3), ("tp", 2)), (("dp_shard", 4), ("tp", 2)), (("dp_shard", 2), ("tp", 4)), (("dp_shard", 8),),
)  # fmt: skip


def right(kind: str, ranks: tuple[int, ...], axis: str, verdicts: list[Any]) -> bool:
    """The costliest verdict is the injected one, and no other rank, node or link is accused beside it."""
    if kind == "none":
        return not verdicts
    if not verdicts:
        return False
    v = verdicts[0]
    expected = {"compute": ("rank", "compute"), "data": ("rank", "data"), "link": ("link", axis), "gc": ("gc", "gc")}
    others = [x for x in verdicts[1:] if x.kind in ("rank", "node", "link", "stage") and x.ranks != v.ranks]
    return (v.kind, v.phase) == expected[kind] and set(v.ranks) == set(ranks) and not others


def real_run(seed: int, only: str | None = None) -> dict[str, Any]:
    from support.ranks import run_ranks
    from support.standin import Fault, Standin, run

    rng = random.Random(seed)
    kind = only or KINDS[seed % len(KINDS)]
    layout = dict(rng.choice(LAYOUTS))
    world = int(np.prod(list(layout.values())))
    rank, axis, first, steps = rng.randrange(world), "", 0, 40
    ranks: tuple[int, ...] = (rank,)
    faults: tuple[Fault, ...] = ()
    amount = 0.0
    if kind == "compute":
        amount = rng.uniform(0.15, 1.0)
        faults = (Fault("compute", amount, ranks, first=first),)
    elif kind == "data":
        amount = rng.uniform(0.008, 0.03)
        faults = (Fault("data", amount, ranks),)
    elif kind == "gc":
        amount = rng.uniform(0.02, 0.06)
        faults = (Fault("gc", amount, ranks, every=rng.choice((2, 3, 5))),)
    elif kind == "link":
        only_tp, has_tp = "dp_shard" not in layout, layout.get("tp", 1) > 1
        axis = "tp" if only_tp or (has_tp and rng.random() < 0.5) else "fsdp"
        ranks = tuple(Layout(**layout).group_of(axis, rank))
        amount = rng.uniform(0.005, 0.015)
        # The only group of its axis can be compared with its own past alone.
        alone = len(ranks) == world
        first = rng.randrange(15, 22) if alone else 0
        faults = (Fault("link", amount, ranks, axis=axis, first=first),)
    with tempfile.TemporaryDirectory() as folder:
        spec = Standin(tuple(layout.items()), steps=steps, seed=seed, faults=faults)
        run_ranks(world, run, spec, folder, timeout_s=120)
        table = load_steps(folder)
        verdicts = find_blame(table)
    good = right(kind, ranks, axis, verdicts)
    # What a wrong answer was made of, so that it can be understood later.
    own = {} if good else {a: np.round(1e3 * t, 2).T.tolist() for a, (_, t) in own_time(table.select(table.work)).items()}
    return {
        "seed": seed, "kind": kind, "layout": layout, "ranks": ranks, "axis": axis, "amount": round(amount, 4),
        "first": first, "right": good, **({"own_ms": own} if own else {}),
        "verdicts": [[v.kind, v.phase, list(v.ranks), v.since, round(v.cost_s, 5), v.evidence] for v in verdicts],
    }  # fmt: skip


def simulated(
    ranks: int, kind: str, seed: int, steps: int = 50, noise: float = 0.02
) -> tuple[StepTable, tuple[int, ...]]:
    """Ranks in groups of 8 (fsdp), then all (world): who is early waits. 100 ms of work, 2% noise each step and 0.7%
    that stays a rank's own. Faults: 5 to 30% slower compute; a loader 5 to 30 ms late; a link of 3 to 8 times the
    time; pauses of 30 to 100 ms in every fourth step."""
    rng = np.random.default_rng(seed)
    layout = Layout(dp_replicate=ranks // 8, dp_shard=8)
    own = np.exp(rng.normal(0, 0.007, ranks))
    shape = (steps, ranks)
    forward = 0.030 * own * np.exp(rng.normal(0, noise, shape))
    backward = 0.065 * own * np.exp(rng.normal(0, noise, shape))
    data = 0.001 * np.exp(rng.normal(0, 0.2, shape))
    optimizer = 0.004 * np.exp(rng.normal(0, noise, shape))
    gc = np.zeros(shape)
    link = np.exp(rng.normal(0, 0.05, (steps, ranks // 8))) * 0.010
    who = int(rng.integers(ranks))
    guilty: tuple[int, ...] = (who,)
    if kind == "compute":
        slow = 1 + rng.uniform(0.05, 0.30)
        forward[:, who] *= slow / own[who]
        backward[:, who] *= slow / own[who]
    elif kind == "data":
        data[:, who] += rng.uniform(0.005, 0.030)
    elif kind == "link":
        link[:, who // 8] *= rng.uniform(3, 8)
        guilty = tuple(range(who // 8 * 8, who // 8 * 8 + 8))
    elif kind == "gc":
        gc[rng.integers(4) :: 4, who] = rng.uniform(0.03, 0.10)
    work = forward + backward + data + optimizer + gc
    by_group = work.reshape(steps, -1, 8)
    ready = by_group.max(axis=2) + link
    fsdp = (ready[:, :, None] - by_group).reshape(shape)
    world = ready.max(axis=1)[:, None] - (work + fsdp) + 0.001
    table = StepTable(
        list(range(ranks)), np.arange(steps), work + fsdp + world,
        {"forward": forward, "backward": backward, "data": data, "optimizer": optimizer, "gc": gc,
         "comm/fsdp": fsdp, "comm/world": world},
        {}, {}, np.ones(shape), np.zeros(shape), np.zeros(steps), np.zeros(steps), np.ones(steps, bool), layout,
        hosts={r: f"node{r // 8:05d}" for r in range(ranks)},
    )  # fmt: skip
    return table, guilty


def simulated_run(ranks: int, seed: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    kind = kinds[seed % len(kinds)]
    table, guilty = simulated(ranks, kind, seed)
    t0 = time.perf_counter()
    verdicts = sorted(judge_window(table), key=lambda v: -v.share)
    took = time.perf_counter() - t0
    return {
        "seed": seed, "kind": kind, "ranks": list(guilty), "seconds": took,
        "right": right(kind, guilty, "fsdp", verdicts),
        "verdicts": [[v.kind, v.phase, list(v.ranks)[:8], v.since, round(v.cost_s, 5)] for v in verdicts],
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in KINDS:
        mine = [r for r in results if r["kind"] == kind]
        if mine:
            out[kind] = {"runs": len(mine), "right": sum(r["right"] for r in mine)}
    faulty = [r for r in results if r["kind"] != "none"]
    if faulty:
        out["right_share_of_faults"] = round(sum(r["right"] for r in faulty) / len(faulty), 4)
    healthy = [r for r in results if r["kind"] == "none"]
    if healthy:
        out["quiet_share_of_healthy"] = round(sum(r["right"] for r in healthy) / len(healthy), 4)
    if any("seconds" in r for r in results):
        out["median_ms_a_window"] = round(1e3 * float(np.median([r["seconds"] for r in results])), 1)
    return out


def write(path: Path, what: str, ranks: int, results: list[dict[str, Any]], not_run: list[int]) -> None:
    """Head and summary, then one run a line."""
    head = {
        "what": what, "ranks": ranks if what == "simulated" else "2-8", "summary": summary(results),
        "did_not_run": not_run, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(r) for r in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n  ' + lines + "\n ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "simulated"])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="faults of this kind alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = Path(args.out) if args.out else None
    before = json.loads(out.read_text()) if out and out.exists() else {}
    results: list[dict[str, Any]] = before.get("runs", [])
    not_run: list[int] = before.get("did_not_run", [])
    done = {r["seed"] for r in results} | set(not_run)
    began = time.monotonic()
    for seed in range(args.first_seed, args.first_seed + args.runs):
        if seed in done:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            break
        if args.what == "real":
            try:
                results.append({**real_run(seed, args.only), "load": round(os.getloadavg()[0], 1)})
            except AssertionError as error:  # ranks that a loaded machine kept from answering: no result
                print(f"seed {seed} did not run: {str(error).splitlines()[0]}", flush=True)
                not_run.append(seed)
                continue
        else:
            results.append(simulated_run(args.ranks, seed, (args.only,) if args.only else KINDS))
        if not results[-1]["right"]:
            print("wrong:", json.dumps(results[-1]), flush=True)
        if out:
            write(out, args.what, args.ranks, results, not_run)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
