"""gloo's reduce-scatter against an exchange and a sum (`trainsys.comm.flat`), taking turns: medians in ms.

    python profiling/reduce_scatter.py --out profiling/results/reduce_scatter.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from support.ranks import run_ranks  # noqa: E402
from trainsys.comm import flat  # noqa: E402


def times(mib: float, repeats: int) -> dict[str, float]:
    warnings.simplefilter("ignore")
    x = torch.randn(int(mib * 2**20) // 4)
    out = torch.empty(len(x) // dist.get_world_size())
    took: dict[str, list[float]] = {"gloo": [], "exchange": []}
    for _ in range(repeats):
        for name, collective in (("gloo", flat._reduce_scatter), ("exchange", flat.reduce_scatter_flat)):
            dist.barrier()
            began = time.perf_counter()
            collective(out, x)
            took[name].append(time.perf_counter() - began)
    return {name: round(1e3 * statistics.median(t), 2) for name, t in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for world in (2, 4, 8):
        for mib in (0.0625, 1.0, 4.0, 16.0):
            ms = run_ranks(world, times, mib, args.repeats)[0]
            rows.append({"ranks": world, "mib": mib, **ms, "times_as_fast": round(ms["gloo"] / ms["exchange"], 2)})
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        note = {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**note, "ms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
