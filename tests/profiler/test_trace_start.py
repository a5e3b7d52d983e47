"""What ``trainsys trace FILE`` imports: a small trace is read in the time that its imports take."""

from __future__ import annotations

import subprocess
import sys

from trainsys.profiler.trace.synthetic import Job, simulate, write_rank

# Each is a tenth of the start or more, and none is needed for the trace of one rank.
NOT_NEEDED = (
    "torch",
    "pydantic",
    "numpy.ma",
    "multiprocessing",
    "concurrent.futures",
    "trainsys.config",
    "trainsys.profiler.hang",
    "trainsys.profiler.memory_snapshot",
    "trainsys.profiler.straggler",
    "trainsys.profiler.whatif",
    "trainsys.profiler.trace.across",
    "trainsys.profiler.trace.nsight",
)


def test_the_trace_of_one_rank_imports_what_it_needs_and_no_more(tmp_path):
    job = Job(ranks=1, steps=2, layers=2, fill=1)
    path = tmp_path / "rank00000.json"
    write_rank(job, simulate(job), 0, path)
    code = (
        "import sys; from trainsys.cli import main; assert main(sys.argv[1:]) == 0; "
        f"print([name for name in {NOT_NEEDED} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "trace", str(path), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "matmul" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
