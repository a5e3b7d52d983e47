"""A layout of the planner's as settings of a RUN.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainsys.errors import UserError
from trainsys.planner.cases import RECOMPUTES, SCHEDULES

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
KEYS = (*AXES, "micro_batch", "vpp", "schedule", "recompute", "reshard", "reduce_each")
CONFIG_NAMES = {"interleaved": "interleaved_1f1b", "zb1": "zero_bubble"}
NAMES: Mapping[str, Sequence[str]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES}
"""Keys whose values are numbered names."""
_HEADINGS = {"mb": "micro_batch", "shard": "dp_shard", "rep": "dp_replicate"}
Columns = dict[str, NDArray[np.float64]]


def key_and_value(name: str, value: str) -> tuple[str, float]:
    """What ``name`` (a key, or a heading of the table) and ``value`` are in the columns of layouts.

    Raises:
        UserError: no such key, or the key has no such value.
    """
    key = _HEADINGS.get(name, name)
    if key not in KEYS:
        raise UserError(f"{name!r} is not one of {', '.join(KEYS)}")
    names = NAMES.get(key)
    if names is not None:
        planned = {told: name for name, told in CONFIG_NAMES.items()}.get(value, value)
        if planned not in names:
            raise UserError(f"{value!r}: {key} is one of {', '.join(names)}")
        return key, float(names.index(planned))
    try:
        return key, float(value)
    except ValueError:
        raise UserError(f"{key}: {value!r} is not a number") from None


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
    parallel["fsdp"] = {
        "reshard_after_forward": bool(layout["reshard"]),
        "reduce_each_micro_batch": bool(layout["reduce_each"]),
    }
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
