"""How fast the planner is: layouts a second on one core, and a whole `trainsys plan` from start to answer.

    python profiling/plan_speed.py [--repeat N] [--json FILE]

Layouts are all that divide Llama-3-70B on 1,024 GPUs, each with its memory and its step time; the command is run as a
user would run it, in a process of its own. The best of N counts, medians are given beside: the machine is shared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy

from recorded import record

from trainsys.config.loader import load_run
from trainsys.planner.cluster import load_cluster
from trainsys.planner.constants import shipped
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.search import CHUNK
from trainsys.planner.space import Job, enumerate_layouts, to_cases
from trainsys.planner.step_time import step_time

ASK = ("train/llama3-70b", "dgx-h100", 1024)


def layouts_per_s() -> float:
    run, cluster, gpus = ASK
    job = Job.of(load_run(run, []), load_cluster(cluster).machine(), gpus, "native", None)
    cases = to_cases(job, enumerate_layouts(job, ()))
    k, m = shipped(), shipped_memory()
    begun = time.perf_counter()
    for start in range(0, cases.size, CHUNK):
        part = cases.take(slice(start, start + CHUNK))
        peak_memory(part, m)
        step_time(part, k)
    return cases.size / (time.perf_counter() - begun)


def command_s() -> float:
    run, cluster, gpus = ASK
    command = [sys.executable, "-m", "trainsys", "plan", run, "--cluster", cluster, "--gpus", str(gpus)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = [layouts_per_s() for _ in range(args.repeat)]
    seconds = [command_s() for _ in range(args.repeat)]
    found = {
        "layouts_per_s": round(max(rates)), "layouts_per_s_median": round(median(rates)),
        "plan_70b_1024_gpus_s": round(min(seconds), 2), "plan_70b_1024_gpus_s_median": round(median(seconds), 2),
        "repeat": args.repeat,
    }  # fmt: skip
    record(found, args.json)


if __name__ == "__main__":
    main()
