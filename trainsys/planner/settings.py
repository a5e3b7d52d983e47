"""A layout of the planner's as settings of a RUN.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainsys.planner.cases import RECOMPUTES, SCHEDULES

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
KEYS = (*AXES, "micro_batch", "vpp", "schedule", "recompute", "reshard")
CONFIG_NAMES = {"interleaved": "interleaved_1f1b", "zb1": "zero_bubble"}
Columns = dict[str, NDArray[np.float64]]


def config_name(schedule: str) -> str:
    """What ``parallel.pipeline.schedule`` calls it."""
    return CONFIG_NAMES.get(schedule, schedule)


def policy(code: int) -> str:
    """The config's name of a recomputation code."""
    return {"half": "selective"}.get(RECOMPUTES[code], RECOMPUTES[code])


def named(layouts: Columns, i: int) -> dict[str, int | str]:
    """Names and values of layout ``i``."""
    out: dict[str, int | str] = {k: int(layouts[k][i]) for k in KEYS}
    out["schedule"] = SCHEDULES[int(layouts["schedule"][i])]
    out["recompute"] = policy(int(layouts["recompute"][i]))
    return out


def run_settings(layout: Mapping[str, int | str]) -> dict[str, Any]:
    """The sections of a RUN.yaml that make a layout which is ``named``."""
    parallel: dict[str, Any] = {axis: layout[axis] for axis in AXES}
    parallel["sequence_parallel"] = True
    parallel["fsdp"] = {"reshard_after_forward": bool(layout["reshard"])}
    if layout["pp"] != 1:
        parallel["pipeline"] = {
            "schedule": config_name(str(layout["schedule"])),
            "virtual_stages": layout["vpp"],
        }
    return {
        "parallel": parallel,
        "train": {"micro_batch": layout["micro_batch"]},
        "recompute": {"policy": layout["recompute"]},
    }
