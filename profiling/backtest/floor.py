"""How near a model can come to the largest sweep of the back-test, and why leave-one-out stops where it does.

    python profiling/backtest/floor.py RUNS.csv [--out profiling/backtest/floor.json]

The sweep ``vtrain-single`` holds 1,440 of the rows. For each (width, tp, micro-batch) without a pipeline its step times
are fitted by m (L layer + head) + L rest + once, with m micro-batches and L layers: what is left over is the sweep's own
noise between repeats, and ``layer_ms`` is what a layer took there. Beside it the planner's error once its constants are
fitted to the sweep alone, which is the least that its formulas leave, and from the other sources alone.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from report import HERE, load

from trainsys.planner.backtest import predict
from trainsys.planner.calibrate import fit_runs
from trainsys.planner.metrics import mape
from trainsys.planner.runs_csv import Run, read

SOURCE = "vtrain-single"


def layer_table(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each (width, tp, micro-batch) whose runs differ in layers and micro-batches."""
    cells = defaultdict(list)
    for run in runs:
        n = run.n
        if n("pp") == 1:
            m = n("global_batch") / n("micro_batch") / n("dp")
            cells[n("d_model"), n("tp"), n("micro_batch")].append((n("n_layers"), m, run.step_s))
    out = []
    for (width, tp, micro_batch), rows in sorted(cells.items()):
        layers, m, seconds = np.asarray(rows, float).T
        if len(set(m)) < 2:
            continue  # a layer's share and the rest cannot be told apart
        terms = np.stack([m * layers, m, layers, np.ones_like(m)], axis=1) / seconds[:, None]
        found = np.linalg.lstsq(terms, np.ones_like(m), rcond=None)[0]
        out.append({
            "d_model": int(width), "tp": int(tp), "micro_batch": int(micro_batch), "runs": len(rows),
            "layer_ms": round(1e3 * float(found[0]), 2),
            "left_over_pct": round(100 * float(np.abs(terms @ found - 1).mean()), 2),
        })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [r for r in read(args.csv) if r.source == SOURCE]
    others = predict(runs, "none", load(HERE / "leave_one_out.yaml"))
    alone = predict(runs, "none", {SOURCE: fit_runs(runs)})
    table = layer_table(runs)
    found = {
        "mape_fitted_to_other_sources_pct": round(mape(others.seconds, others.measured), 2),
        "mape_fitted_to_itself_pct": round(mape(alone.seconds, alone.measured), 2),
        "left_over_by_the_table_pct": round(float(np.mean([row["left_over_pct"] for row in table])), 2),
        "layers": table,
    }
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
