"""``trainsys plan``: rank the layouts of a run on a cluster, say why, write the winner."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from trainsys.config.loader import load_run, read_tree
from trainsys.config.secrets import is_secret
from trainsys.config.text import dump
from trainsys.errors import UserError
from trainsys.flops import param_counts
from trainsys.planner import explain, learned
from trainsys.planner.cases import ARCHS
from trainsys.planner.cluster import Cluster, load_cluster
from trainsys.planner.constants import DENSE, LOW, MOE, expected_error_pct, shipped, shipped_sources
from trainsys.planner.goodput import checkpoint_seconds, goodput
from trainsys.planner.memory import GIB
from trainsys.planner.memory_constants import shipped_memory
from trainsys.planner.search import Found, search
from trainsys.planner.settings import run_settings
from trainsys.planner.space import Job, parse_limits
from trainsys.planner.step_time import StepTime
from trainsys.planner.view import render

_PLANNED = "Planned by trainsys plan:"
_MEMORY = ("total", "parameters", "gradients", "optimizer", "activations", "logits", "buffers")


def world_of(cluster: Cluster, gpus: int | None) -> int:
    """Devices of a plan. UserError where neither the cluster nor ``--gpus`` says."""
    if gpus is not None:
        if gpus < 1:
            raise UserError(f"--gpus {gpus}: at least 1")
        return gpus
    if cluster.nodes is None:
        raise UserError(f"cluster {cluster.name} names no size: give --gpus N")
    return cluster.nodes * cluster.gpus_per_node


def winner(found: Found, i: int = 0) -> dict[str, Any]:
    """The settings of a RUN.yaml that make layout ``i``."""
    return run_settings(found.layout(i))


def write_winner(
    run_yaml: str | Path, overrides: Sequence[str], found: Found, cluster: str, path: str | Path
) -> None:
    """The run's own settings with the winning layout and the nodes it takes laid over them.

    ``cluster``: name or file of the planned one. Values of secrets are left out. Raises UserError if the file cannot be
    written, or is there and no earlier plan wrote it: its comments, if not more, would be lost.
    """
    if _is_somebody_elses(Path(path)):
        raise UserError(f"--write {path}: the file exists and was not written by trainsys plan; give another name")
    values = read_tree(run_yaml, overrides).values
    for section, settings in winner(found).items():
        values.setdefault(section, {}).update(settings)
    per_node = devices_per_node(found.job.world, load_cluster(cluster).gpus_per_node)
    launch = values.setdefault("launch", {})
    launch |= {"nodes": found.job.world // per_node, "devices_per_node": per_node, "cluster": cluster}
    notes = [f"{_PLANNED} {explain.short(found, 0)}, {found.time.total[0]:.2f} s per step predicted"]
    for name in [n for n, value in launch.get("env", {}).items() if is_secret(n, str(value))]:
        del launch["env"][name]
        notes.append(f"launch.env.{name} is not written down: give it to trainsys launch")
    try:
        Path(path).write_text("".join(f"# {n}\n" for n in notes) + dump(values), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror or error}") from error


def _is_somebody_elses(path: Path) -> bool:
    try:
        with path.open(errors="replace") as file:
            return not file.readline().startswith(f"# {_PLANNED}")
    except OSError:
        return False  # what is wrong with it is said when it is written


def devices_per_node(world: int, most: int) -> int:
    """Ranks of each node where ``world`` of them are spread evenly over nodes of ``most`` devices."""
    return max(n for n in range(1, most + 1) if world % n == 0)


def entry(found: Found, i: int) -> dict[str, Any]:
    """One ranked layout as plain data. Seconds, GiB, shares of 1."""
    total = float(found.time.total[i])
    job = found.job
    mem = found.memory
    return {
        "layout": found.layout(i),
        "step_time_s": total,
        "mfu": float(found.mfu[i]),
        "tokens_per_s_per_gpu": job.global_batch * job.seq_len / total / job.world,
        "memory_gib": {p: float(getattr(mem, p)[i]) / GIB for p in _MEMORY},
        "time_s": {p: float(getattr(found.time, p)[i]) for p in explain.PARTS},
        "bottleneck": explain.bottleneck(found.time, i),
    }


def result(found: Found, cluster: Cluster, top: int, why: str | None) -> dict[str, Any]:
    """Everything ``plan`` says, as plain data."""
    k = shipped()
    nodes = max(found.job.world // cluster.gpus_per_node, 1)
    params = param_counts(found.job.model).total
    save_s = checkpoint_seconds(params, nodes, cluster.checkpoint_gb_s, cluster.storage_gb_s)
    good = goodput(nodes, cluster.mtbf_hours_per_node * 3600.0, save_s, cluster.restart_s)
    first = entry(found, 0)
    return {
        "model": found.job.model.name,
        "parameters": params,
        "cluster": cluster.name,
        "devices": found.job.world,
        "considered": found.considered,
        "refused_memory": found.over_memory,
        "memory_margin": found.margin,
        "mfu_definition": "exact FLOPs (causal, no recomputation) over "
        f"{found.job.machine.peak_16 / 1e12:g} TFLOP/s dense 16-bit",
        "ranked": [entry(found, i) for i in found.distinct(top)],
        "pareto": [entry(found, i) for i in found.pareto()[:top]],
        "why_first": explain.why_first(found),
        "why_not": explain.why_not(found, why, k, shipped_memory()) if why else None,
        "sensitivity": [{"change": n, "tokens_per_s_gain_pct": g} for n, g in explain.sensitivity(found, k)],
        "goodput": {
            "mtbf_s": good.mtbf_s,
            "checkpoint_every_s": good.interval_s,
            "checkpoint_blocks_s": good.checkpoint_s,
            "share": good.share,
            "effective_mfu": good.share * first["mfu"],
        },
        "confidence": confidence(found),
    }


def confidence(found: Found) -> str:
    """How far to trust the numbers, from what the constants were fitted to."""
    arch = found.job.machine.arch
    known = {
        0: "few, noisy V100 runs",
        1: "A100 runs of many sources",
        2: "H100 runs of many sources",
        3: "few Blackwell runs",
    }
    base = known.get(arch, "no run of this device: catalogue figures alone")
    sources = f"{len(shipped_sources())} sources; {base}"
    job = found.job
    low = job.dtype in ("fp8", "fp4") or arch == ARCHS.index("blackwell")
    error = expected_error_pct(MOE if job.model.moe else LOW if low else DENSE)
    mean = "" if error is None else f", which left out in turn are predicted {error:.0f}% off on average"
    return f"constants fitted to published runs ({sources}){mean}; runs measured here (--calibration) narrow that"


def plan(
    run_yaml: str | Path,
    cluster: str,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    json: bool = False,
    top: int = 10,
    write: str | Path | None = None,
    limits: Sequence[str] = (),
    margin: float = 0.05,
    why: str | None = None,
    stack: str | None = None,
    dtype: str | None = None,
    show_schedule: str | Path | bool = False,
    calibration: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The command. ``margin``: share of usable memory kept free. ``show_schedule``: draw the winner's pipeline, in the
    terminal or to an SVG file. ``calibration``: what a sweep has learned, or a bench measured. Returns what it printed.

    Raises:
        UserError: unknown cluster, device, key or stack; nothing divides or fits (with what would).
    """
    if not 0.0 <= margin < 1.0:
        raise UserError(f"--margin {margin}: between 0 and 1")
    if top < 1:
        raise UserError(f"--top {top}: at least 1")
    run = load_run(run_yaml, overrides)
    where = load_cluster(cluster)
    known = None if calibration is None else learned.load(calibration)
    machine = where.machine() if known is None else known.machine(where.machine())
    job = Job.of(run, machine, world_of(where, gpus), stack, dtype)
    found = search(job, parse_limits(limits), margin, k=None if known is None else known.constants)
    if known is not None:
        scaled = {f.name: known.scale * getattr(found.time, f.name) for f in fields(StepTime)}
        found = replace(found, time=StepTime(**scaled))
    data = result(found, where, top, why)
    if known is not None:
        data["confidence"] = known.confidence
    if write is not None:
        write_winner(run_yaml, overrides, found, cluster, write)
        data["written"] = str(write)
    if json:
        print(jsonlib.dumps(data, indent=1))
        return data
    screen = console or Console(highlight=False)
    if console is None and not screen.is_terminal:
        screen = Console(highlight=False, width=100)
    render(data, screen)
    if write is not None:
        screen.print(f"wrote {write}", highlight=False)
    if show_schedule:
        from trainsys.planner.schedule_view import show_winner

        show_winner(found, show_schedule, screen)
    return data
