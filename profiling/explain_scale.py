"""What a long run costs: bytes on disk per step and rank, and time and memory of ``trainsys explain``.

    python profiling/explain_scale.py --ranks 64 --steps 5000 20000 --out profiling/results/explain_scale.json

The event files are written by the real recorder on a clock of its own (tests/support/made_run.py: pipeline, tensor and
sharded-data ranks, four micro-batches); one rank is recorded and copied to the others. Each run is then explained in a
process of its own, whose highest resident memory stands beside that of one that explains 2 ranks x 50 steps, which is
libraries and interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from recorded import record  # noqa: E402

from support.made_run import Run, copies  # noqa: E402
from trainsys.layout import Layout  # noqa: E402

EXPLAIN = """
import resource, sys
from trainsys.profiler.explain import explain, to_json
size = len(to_json(explain(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size)
"""


def explained(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", EXPLAIN, str(folder)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, size = map(int, done.stdout.split())
    return {
        "explain_s": round(time.perf_counter() - began, 1),
        "peak_rss_mib": round(peak / 2**20, 1),
        "json_kib": round(size / 2**10, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument("--out")
    args = parser.parse_args()
    found: dict[str, Any] = {"ranks": args.ranks, "load_average_before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as folder:
        least = Path(folder, "least")
        copies(Run(Layout(dp_shard=2)), least, 2, 50)
        found["least_rss_mib"] = explained(least)["peak_rss_mib"]
        for steps in args.steps:
            run = Path(folder, str(steps))
            copies(Run(Layout(pp=2, tp=2, dp_shard=args.ranks // 4)), run, args.ranks, steps)
            size = sum(path.stat().st_size for path in (run / "events").iterdir())
            bytes_each = round(size / args.ranks / steps, 1)
            found[str(steps)] = {"bytes_per_step_and_rank": bytes_each, **explained(run)}
    record(found, args.out)


if __name__ == "__main__":
    main()
