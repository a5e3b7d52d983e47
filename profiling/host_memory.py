"""What it is worth on a CPU that glibc keeps freed memory (`trainsys.engines.host_memory`): pairs of one training.

    python profiling/host_memory.py --rounds 6 --out profiling/results/host_memory.json

Two groups of processes train the same model, one told to keep and one left alone, and take turns. The figure is the
median over rounds of the ratio of their step times; peaks of resident memory stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "profiling")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import engines_benchmark as benchmark  # noqa: E402
import torch  # noqa: E402

from support.ranks import _Pool  # noqa: E402
from trainsys.engines import native  # noqa: E402

_state: dict[str, Any] = {}


def start(layout: str, keep: bool) -> None:
    torch.set_num_threads(1)
    if not keep:
        native.keep_freed = lambda: None  # type: ignore[attr-defined]
    _state.update(step=benchmark.engine_step(benchmark.config(layout, "native", {})), number=0)


def steps(count: int) -> tuple[float, int]:
    """Seconds per step, and the peak resident memory in MiB."""
    began = time.perf_counter()
    for _ in range(count):
        _state["step"](_state["number"])
        _state["number"] += 1
    return (time.perf_counter() - began) / count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layouts", nargs="*", default=["one process", "replicas", "sharded", "tp", "tp+sp"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for layout in args.layouts:
        world = benchmark.LAYOUTS[layout][0]
        pools = {keep: _Pool(world) for keep in (False, True)}
        for keep, pool in pools.items():
            pool.run(start, (layout, keep), 120)
            pool.run(steps, (2,), 120)
        ratios, peaks = [], {}
        for turn in range(args.rounds):
            took = {}
            for keep in (False, True) if turn % 2 else (True, False):
                ranks = pools[keep].run(steps, (args.steps,), 120)
                took[keep], peaks[keep] = ranks[0][0], ranks[0][1]
            ratios.append(took[False] / took[True])
        for pool in pools.values():
            pool.kill()
        found[layout] = {
            "times_as_fast": round(statistics.median(ratios), 3), "rounds": [round(r, 3) for r in ratios],
            "peak_mib": {"kept": peaks[True], "left alone": peaks[False]},
        }  # fmt: skip
        print(layout, json.dumps(found[layout]), flush=True)
    if args.out:
        note = {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**note, "layouts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
