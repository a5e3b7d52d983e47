"""How long a dry run of 405B on 4,096 ranks takes, and how much memory, and that its FLOPs and bytes are the planner's.

    python profiling/dryrun_405b.py            # writes profiling/results/dryrun_405b.json
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from trainsys.config.loader import load_run
from trainsys.dryrun.main import dryrun
from trainsys.layout import Layout
from trainsys.planner.exact import Place, step_flops, step_traffic

RESULT = Path(__file__).parent / "results" / "dryrun_405b.json"
RUN, WORLD = "train/llama3-405b", 4096


def main() -> None:
    data = dryrun(RUN, world=WORLD, rank="0", json=True)
    cfg = load_run(RUN)
    place = Place(cfg, Layout.resolve(cfg.parallel, WORLD), 0)
    (rank,) = data["ranks"]
    traffic = rank["traffic"].items()
    sent = {
        f"{axis} {op}": t["sent_bytes"] for axis, ops in traffic for op, t in ops.items() if t["sent_bytes"]
    }
    data["planner_equal"] = {
        "flops": step_flops(place) == rank["flops"],
        "bytes": {f"{axis} {op}": n for (axis, op), n in step_traffic(place).items()} == sent,
    }
    data["load_average"], data["cpu_seconds"] = os.getloadavg()[0], time.process_time()
    RESULT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
