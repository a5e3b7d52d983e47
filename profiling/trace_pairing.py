"""Are collectives paired right, and is the right rank named? Generated jobs with every hazard that recordings have.

    python profiling/trace_pairing.py [--jobs 200] [--out profiling/results/trace_pairing.json]

Each job has a random number of ranks on hosts whose clocks are apart and drift, loses collectives from its records,
or has every rank record steps of its own; with and without sequence numbers, step annotations and host names; and in
half of the jobs one rank is slow. Written as files and read back through ``trainsys trace``'s own function.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from trainsys.profiler.trace.analyse import Options, analyse_file
from trainsys.profiler.trace.main import analyse
from trainsys.profiler.trace.matching import match
from trainsys.profiler.trace.synthetic import BASE_NS, Job, Timeline, write_job


def random_job(seed: int) -> tuple[Job, int | None]:
    """A job and its slow rank, if it has one."""
    rng = np.random.default_rng(seed)
    ranks, per_host = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    hosts = range(-(-ranks // per_host))
    slow = int(rng.integers(0, ranks)) if rng.random() < 0.5 else None
    steps = int(rng.integers(6, 14))
    return Job(
        ranks=ranks,
        ranks_per_host=per_host,
        steps=steps,
        layers=int(rng.integers(1, 6)),
        product_ns=int(10 ** rng.uniform(5.6, 7.3)),
        reduce_ns=int(10 ** rng.uniform(4.3, 6.0)),
        slow={} if slow is None else {slow: float(rng.uniform(1.08, 1.6))},
        noise=float(rng.uniform(0.002, 0.02)),
        clock_ns={h: 10**10 + int(rng.normal(0, 10 ** rng.uniform(3, 9))) for h in hosts},
        drift_ppm={h: float(rng.uniform(-50, 50)) for h in hosts} if rng.random() < 0.5 else {},
        missing=float(rng.choice([0, 0, 0.03, 0.1])),
        sampled=int(rng.integers(5, steps)) if rng.random() < 0.3 else 0,
        sequence=bool(rng.random() < 0.5),
        marks=bool(rng.random() < 0.5),
        host_names=bool(rng.random() < 0.7),
        seed=seed,
    ), slow


def wrong_pairs(job: Job, timeline: Timeline, folder: Path) -> tuple[int, int]:
    """(matched collectives that are not one and the same, matched collectives)."""
    comms = {r: analyse_file(folder / f"rank{r:05d}.json", Options()).comms for r in range(job.ranks)}
    hosts = {r: f"host{r // job.ranks_per_host}" if job.host_names else "" for r in range(job.ranks)}
    wrong = total = 0
    for g in match(comms, hosts).groups:
        what = []
        for j, r in enumerate(g.ranks):
            begun = timeline.start[r, :, :, 2].ravel().tolist()
            number = {BASE_NS + job.clock(r, t): n for n, t in enumerate(begun)}
            what.append([number[t] for t in g.start[:, j].tolist()])
        total += len(what[0])
        wrong += sum(len(set(same)) > 1 for same in zip(*what, strict=True))
    return wrong, total


def run(jobs: int) -> dict[str, object]:
    out = {"jobs": jobs, "wrong_pairs": 0, "pairs": 0, "slow_jobs": 0, "named_right": 0, "named_nobody": 0,
           "named_wrong": 0, "healthy_jobs": 0, "healthy_blamed": 0, "nothing_compared": 0}  # fmt: skip
    for seed in range(jobs):
        job, slow = random_job(seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            timeline = write_job(job, folder)
            report = analyse([folder], workers=1, critical=False)
            wrong, total = wrong_pairs(job, timeline, folder)
        assert report.across is not None
        named = {int(v.title.split()[1]) for v in report.verdicts if v.kind in ("straggler", "late")}
        out["wrong_pairs"] += wrong
        out["pairs"] += total
        out["nothing_compared"] += not report.across.ranks
        if slow is None:
            out["healthy_jobs"] += 1
            out["healthy_blamed"] += bool(named)
        else:
            out["slow_jobs"] += 1
            out["named_right"] += named == {slow}
            out["named_nobody"] += not named
            out["named_wrong"] += bool(named - {slow})
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = json.dumps(run(args.jobs), indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
