"""A ready dashboard of a W&B project: where MFU goes, what is learned, memory, and a sweep's layouts side by side.

``workspace_json`` needs no server. ``save_workspace`` sends it, once, with the user's own login.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from trainsys.errors import UserError

PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Where MFU goes": {
        "MFU and HFU": ("perf/mfu", "perf/mfu_palm", "perf/hfu"),
        "Useful, and compute below the peak, ms": (
            "waterfall/useful_ms", "waterfall/compute_ms", "waterfall/compute_below_peak_ms",
            "waterfall/padding_ms", "waterfall/recompute_ms", "waterfall/optimizer_ms",
        ),
        "Exposed communication, ms": tuple(
            f"waterfall/comm_{axis}_ms" for axis in ("tp", "fsdp", "dp_replicate", "cp", "ep", "world")
        ),
        "Waiting, ms": (
            "waterfall/straggler_ms", "waterfall/bubble_ms", "waterfall/data_ms", "waterfall/gc_ms",
            "waterfall/stall_pauses_ms", "waterfall/unattributed_ms",
        ),
        "Step time, s": ("perf/step_time_s",),
        "Tokens a second": ("perf/tokens_per_s",),
    },
    "What is learned": {
        "Loss": ("train/loss",),
        "Gradient norm": ("train/grad_norm",),
        "Learning rate": ("train/lr",),
    },
    "Slowest rank": {
        "Forward, s": ("time/forward_s", "time/max_forward_s"),
        "Backward, s": ("time/backward_s", "time/max_backward_s"),
        "Data, s": ("time/data_s", "time/max_data_s"),
    },
    "Memory": {"GiB, rank with the highest use": ("memory/peak_gib", "memory/reserved_gib", "memory/rss_gib")},
}  # fmt: skip
TABLES = {"Waterfall": "waterfall", "Verdicts": "verdicts"}
LAYOUT = (
    "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep",
    "train.micro_batch", "engine",
)  # fmt: skip
"""Settings that a sweep tells runs apart by, and what they led to: one line a run."""
OUTCOME = ("memory/peak_gib", "perf/step_time_s", "perf/mfu")


def _workspace(project: str, entity: str) -> Any:
    try:
        ws, panels = import_module("wandb_workspaces.workspaces"), import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise UserError("a W&B workspace needs wandb-workspaces: pip install 'trainsys[wandb]'") from None
    sections = [
        ws.Section(
            name=name,
            panels=[panels.LinePlot(title=title, x="step", y=list(metrics)) for title, metrics in plots.items()],
            is_open=True,
        )
        for name, plots in PANELS.items()
    ]
    tables = [panels.WeaveTable(title=title, table_name=key) if hasattr(panels, "WeaveTable")
              else panels.WeavePanelSummaryTable(table_name=key) for title, key in TABLES.items()]  # fmt: skip
    sections.insert(1, ws.Section(name="The ledger and who is late", panels=tables, is_open=True))
    column = panels.ParallelCoordinatesPlotColumn
    lines = panels.ParallelCoordinatesPlot(
        title="Layouts of a sweep",
        columns=[column(metric=panels.Config(name), display_name=name.split(".")[-1]) for name in LAYOUT]
        + [column(metric=panels.SummaryMetric(name), display_name=name) for name in OUTCOME],
    )
    sections.append(ws.Section(name="Which layout", panels=[lines], is_open=True))
    return ws.Workspace(name="trainsys: where MFU goes", entity=entity, project=project, sections=sections)


def workspace_json(project: str, entity: str = "") -> str:
    """The workspace as W&B stores it. Raises UserError without the extra."""
    model = _workspace(project, entity)._to_model()  # private, and the one way that needs no login
    return json.dumps(json.loads(model.model_dump_json(by_alias=True, exclude_none=True)), indent=1)


def save_workspace(project: str, entity: str) -> str:
    """Sends the workspace to the server that the user is logged in to; its address."""
    workspace = _workspace(project, entity)
    workspace.save()
    return str(workspace.url)
