"""Hardware FLOPs of each step, told apart: padding, and what recomputation repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.flops import token_flops
from trainsys.profiler.steps import StepTable
from trainsys.profiler.waterfall import Work


def load_config(run_dir: str | Path) -> RunConfig | None:
    """The run's own ``config.yaml``; None where it is missing, damaged or of another version."""
    try:
        return load_run(str(Path(run_dir) / "config.yaml"), ())
    except (UserError, OSError, ValueError):
        return None


def recomputed_share(cfg: RunConfig) -> float:
    """Forward FLOPs that backward repeats under the run's policy, as a share of forward's."""
    if cfg.recompute.policy == "none":
        return 0.0
    flops = token_flops(cfg.model, cfg.train.seq_len, cfg.recompute)
    return float(flops.recomputed) / float(flops.forward)


def split_flops(table: StepTable, cfg: RunConfig | None) -> Work:
    """``hardware = model + padding + recompute``: forward F is a third of model and padding, and recomputation
    repeats the share of it that the policy names. Without a config nothing is taken for recomputed."""
    share = 0.0 if cfg is None else recomputed_share(cfg)
    forward = table.flops_hardware / (3.0 + share)
    recompute = share * forward
    padding = np.maximum(0.0, table.flops_hardware - recompute - table.flops_model)
    # Rounding of two large counts is no padding.
    padding[padding < 1e-9 * table.flops_hardware] = 0.0
    padded = table.padded.any() if table.of_run is None else table.of_run.padded
    if not padded:
        padding[:] = 0.0
    return Work(padding, recompute, share)
