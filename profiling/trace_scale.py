"""How ``trainsys trace`` grows: CPU time with bytes, memory with ranks and with bytes. Synthetic traces, one run.

    python profiling/trace_scale.py [--ranks 64] [--mb 45] [--workers 2]

Two series. *Ranks*: the first 8, 16, 32 … of a set written by ``trainsys.profiler.trace.synthetic``, several
GB of JSON in all: CPU time must grow linearly, memory must not grow with the ranks. *Bytes*: one rank with the
same kernels and ever more host operators beside them: memory must follow the kernels, not the bytes. Measured
as in ``trace_benchmark.py``; figures go to ``results/trace_scale.json``. ``--keep DIR`` keeps the set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from trace_benchmark import ROOT, measure

sys.path.insert(0, str(ROOT))

from trainsys.profiler.trace.synthetic import Job, Timeline, simulate, write_rank

RESULT = ROOT / "profiling/results/trace_scale.json"
BYTES_A_LAUNCH_FILL = 400
CODE = """
import json, sys
from pathlib import Path
from trainsys.profiler.trace.main import analyse
if __name__ == "__main__":
    folder, n = sys.argv[1].rsplit("#", 1)
    files = sorted(Path(folder).glob("*.gz"))[: int(n)]
    report = analyse(files, critical=False, workers=%d)
    json.dump({"ranks": len(report.ranks), "bytes": sum(r.size_bytes for r in report.ranks),
               "events": sum(r.events for r in report.ranks),
               "kernels": sum(r.launch.linked for r in report.ranks),
               "matched": report.across.matched if report.across else 0,
               "stragglers": [s.rank for s in report.across.stragglers] if report.across else []},
              open(folder + "/said.json", "w"))
"""


def write_one(job: Job, timeline: Timeline, rank: int, folder: Path) -> None:
    write_rank(job, timeline, rank, folder / f"rank{rank:05d}.json.gz")


def point(folder: Path, n: int, workers: int, script: Path) -> dict[str, float]:
    used = measure(sys.executable, CODE % workers, Path(f"{folder}#{n}"), script)
    said = json.loads((folder / "said.json").read_text())
    row = {
        **said,
        **{k: round(v, 2) for k, v in used.items()},
        "mb_per_cpu_s": round(said["bytes"] / 1e6 / used["cpu_s"], 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--mb", type=float, default=45, help="JSON of one rank, MB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write the set here and leave it")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary) / "run_scale.py"
        folder = args.keep or Path(temporary) / "set"
        folder.mkdir(parents=True, exist_ok=True)
        layers, fill = 40, 6
        a_step = (layers * 4 + 1) * (fill * BYTES_A_LAUNCH_FILL + 900)
        job = Job(
            ranks=args.ranks,
            steps=max(2, round(args.mb * 1e6 / a_step)),
            layers=layers,
            fill=fill,
            noise=0.01,
            slow={args.ranks // 3: 1.08},
        )
        timeline = simulate(job)
        with ProcessPoolExecutor(args.workers) as pool:
            for done in [pool.submit(write_one, job, timeline, r, folder) for r in range(job.ranks)]:
                done.result()
        counts = [n for n in (4, 8, 16, 32, 64, 128, 256) if n <= args.ranks]
        ranks = [point(folder, n, args.workers, script) for n in counts]
        sizes = []
        for more in (1, 4, 16, 48):
            single = Path(temporary) / f"fill{more}"
            single.mkdir()
            one = Job(ranks=1, steps=10, layers=layers, fill=more)
            write_rank(one, simulate(one), 0, single / "rank00000.json.gz")
            sizes.append(point(single, 1, 1, script))
    x, y = np.array([r["bytes"] for r in ranks], float), np.array([r["cpu_s"] for r in ranks], float)
    slope, offset = np.polyfit(x, y, 1)
    residual = float(np.abs(y - (slope * x + offset)).max() / y.max())
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "workers": args.workers,
        "job": {"ranks": job.ranks, "steps": job.steps, "layers": layers, "slow_rank": args.ranks // 3},
        "by_ranks": ranks,
        "by_bytes_of_one_rank": sizes,
        "linear_fit": {
            "cpu_s_per_gb": round(slope * 1e9, 3),
            "cpu_s_fixed": round(offset, 3),
            "largest_residual": round(residual, 4),
        },
        "memory_growth_over_ranks": round(ranks[-1]["peak_mib"] / ranks[0]["peak_mib"], 3),
        "command": "python profiling/trace_scale.py",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("linear_fit", "memory_growth_over_ranks")}, indent=1))


if __name__ == "__main__":
    main()
