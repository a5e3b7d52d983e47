"""CPU time and memory of ``trainsys trace`` beside HTA's and TraceLens's on the same files, in one run.

    python profiling/trace_benchmark.py --hta-python PYTHON [--tracelens-python PYTHON] [--repeat 3]

Three cases (``--cases``): ``small``, a file of 1 MB; ``file``, HTA's own test trace ``df_index_resolver`` (53.7 MB of
JSON); ``ranks``, eight copies of that (430 MB in all), each with its own rank. The tools alternate; the median of
the repeats counts. CPU seconds are user plus system of
the process and all its children; memory is the largest sum of proportional set sizes over the process tree,
sampled every 50 ms. HTA does what its documentation starts with: load, temporal breakdown, overlap. TraceLens
builds its tree of each trace and the GPU timeline. ``trainsys`` does the same as HTA (``equal``), and all of its
report with critical path, JSON and HTML (``full``). Figures go to ``results/trace_benchmark.json``.

HTA comes from PyPI (``HolisticTraceAnalysis``). AMD's TraceLens is installed from its source
(github.com/AMD-AGI/TraceLens): the package of that name on PyPI is another project's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT / "../shared/data/traces"
SHARED = TRACES / "hta/df_index_resolver/df_index_resolver.json.gz"
SMALL = TRACES / "dlrm8_v100_8ranks"
RESULT = ROOT / "profiling/results/trace_benchmark.json"

HTA = """
import sys, warnings; warnings.filterwarnings("ignore")
from hta.trace_analysis import TraceAnalysis
if __name__ == "__main__":
    a = TraceAnalysis(trace_dir=sys.argv[1])
    print(a.get_temporal_breakdown(visualize=False).to_string())
    print(a.get_comm_comp_overlap(visualize=False).to_string())
"""
TRACELENS = """
import sys, glob
from TraceLens.TreePerf import TreePerfAnalyzer
if __name__ == "__main__":
    for path in sorted(glob.glob(sys.argv[1] + "/*.gz")):
        print(TreePerfAnalyzer.from_file(path).get_df_gpu_timeline())
"""
EQUAL = """
import sys
from trainsys.profiler.trace.main import analyse
if __name__ == "__main__":
    for r in analyse([sys.argv[1]], critical=False).ranks:
        w = r.breakdown.whole
        print(r.rank, w.span, w.matmul + w.other_compute, w.comm_exposed, w.idle, w.overlap)
"""
FULL = """
import sys
from trainsys.profiler.trace.main import run
if __name__ == "__main__":
    print(run([sys.argv[1]], json=sys.argv[1] + ".report.json", html=sys.argv[1] + ".html"))
"""


def make_case(folder: Path, copies: int) -> int:
    """The copies, each with its rank, or for none the small file; returns decompressed bytes in all."""
    if not copies:
        raw = next(SMALL.glob("worker0*")).read_bytes()
        (folder / "rank0.json.gz").write_bytes(gzip.compress(raw, 6))
        return len(raw)
    raw = gzip.decompress(SHARED.read_bytes())
    for rank in range(copies):
        text = re.sub(
            rb'"rank": 1, "world_size": 2', b'"rank": %d, "world_size": %d' % (rank, copies), raw, count=1
        )
        assert text != raw or rank == 1, "the rank was not found in the trace's header"
        (folder / f"rank{rank}.json.gz").write_bytes(gzip.compress(text, 6))
    return copies * len(raw)


def tree(pid: int) -> list[int]:
    """The process and all its descendants now."""
    out, todo = [], [pid]
    while todo:
        p = todo.pop()
        out.append(p)
        try:
            for task in os.listdir(f"/proc/{p}/task"):
                todo += [int(c) for c in Path(f"/proc/{p}/task/{task}/children").read_text().split()]
        except OSError:
            continue
    return out


def pss_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        try:
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        except OSError:
            continue
        total += int(found[1]) if found else 0
    return total / 1024


def measure(python: str, code: str, folder: Path, script: Path) -> dict[str, float]:
    """Run one tool once. Raises RuntimeError with its last output if it fails."""
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the peers lie in their environments compiled
    log = script.with_suffix(".log")
    begin, peak = time.perf_counter(), 0.0
    with log.open("w") as out:
        process = subprocess.Popen(
            [python, str(script), str(folder)], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, pss_mib(tree(process.pid)))
            time.sleep(0.05)
    if status:
        raise RuntimeError(f"{python}: {log.read_text()[-2000:]}")
    return {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": time.perf_counter() - begin, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hta-python", required=True, help="python of an environment with HolisticTraceAnalysis"
    )
    parser.add_argument("--tracelens-python", help="python of an environment with AMD's TraceLens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cases", default="small,file,ranks", help="of these; the others' results stay")
    parser.add_argument("--copies", type=int, default=8, help="of the case `ranks`")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not SHARED.exists():
        sys.exit(f"{SHARED} is not here: the benchmark needs the shared traces")
    tools = {
        "hta": (args.hta_python, HTA),
        "trainsys_equal": (sys.executable, EQUAL),
        "trainsys_full": (sys.executable, FULL),
    }
    if args.tracelens_python:
        tools["tracelens"] = (args.tracelens_python, TRACELENS)
    copies = {"small": 0, "file": 1, "ranks": args.copies}
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for case in args.cases.split(","):
        result[case] = run_case(copies[case], tools, args.repeat)
        print(case, json.dumps({k: result[case][k] for k in ("median", "ratio")}, indent=1), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def run_case(copies: int, tools: dict[str, tuple[str, str]], repeat: int) -> dict[str, Any]:
    """All tools on one case, in turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "case"
        folder.mkdir()
        size = make_case(folder, copies)
        for turn in range(repeat):
            for name, (python, code) in tools.items():
                runs[name].append(measure(python, code, folder, Path(temporary) / f"run_{name}.py"))
                print(turn, name, {k: round(v, 2) for k, v in runs[name][-1].items()}, flush=True)
    median = {
        n: {k: round(statistics.median(r[k] for r in rows), 3) for k in rows[0]} for n, rows in runs.items()
    }
    return {
        "case": f"{copies} of df_index_resolver, {size / 1e6:.0f} MB of JSON" if copies else "one rank of DLRM, 0.9 MB",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load": [round(x, 1) for x in os.getloadavg()],
        "median": median,
        "runs": runs,
        "ratio": {
            f"{peer} over {ours}": {
                "cpu": round(median[peer]["cpu_s"] / median[ours]["cpu_s"], 2),
                "memory": round(median[peer]["peak_mib"] / median[ours]["peak_mib"], 2),
            }
            for peer in ("hta", "tracelens")
            for ours in ("trainsys_equal", "trainsys_full")
            if peer in median
        },
        "command": "python profiling/trace_benchmark.py --hta-python PYTHON --tracelens-python PYTHON",
    }


if __name__ == "__main__":
    main()
