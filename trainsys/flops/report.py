"""``trainsys flops``: what one token of a run costs, by component and by convention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from rich.console import Console
from rich.table import Table

from trainsys.config.loader import load_run
from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops.counts import Convention, token_flops, train_flops_per_token
from trainsys.flops.params import param_counts


def by_convention(
    model: ModelConfig, seq_len: int, recompute: RecomputeConfig | None = None
) -> dict[str, float]:
    """Training FLOPs a token by every convention, and ``hardware``: exact with recomputation."""
    counts = {name: train_flops_per_token(model, seq_len, name) for name in get_args(Convention)}
    return counts | {"hardware": token_flops(model, seq_len, recompute).hardware}


def run_cli(run: str, overrides: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the FLOPs a token of the run that a config and overrides describe.

    Raises:
        UserError: the config is not one.
    """
    config = load_run(run, overrides)
    model, seq_len = config.model, config.train.seq_len
    params, token = param_counts(model), token_flops(model, seq_len)
    conventions = by_convention(model, seq_len, config.recompute)
    forward = {part: flops for part, flops in asdict(token).items() if flops and part != "recomputed"}
    if as_json:
        totals = {"total": params.total, "active": params.active}
        out = {"model": model.name, "seq_len": seq_len, "params": asdict(params) | totals}
        print(json.dumps(out | {"forward": forward, "train": conventions}, indent=1))
        return
    console = Console()
    active = "" if params.active == params.total else f" ({params.active:,} active)"
    console.print(f"{model.name}: {params.total:,} parameters{active}, sequences of {seq_len:,}")
    table = Table("forward, by component")
    table.add_column("MFLOP a token", justify="right")
    table.add_column("share", justify="right")
    for part, flops in forward.items():
        table.add_row(part, f"{flops / 1e6:,.2f}", f"{flops / token.forward:.1%}")
    console.print(table)
    table = Table("training, by convention")
    table.add_column("MFLOP a token", justify="right")
    table.add_column("of exact", justify="right")
    for name, flops in conventions.items():
        policy = f" (recompute {config.recompute.policy})" if name == "hardware" else ""
        table.add_row(f"{name}{policy}", f"{flops / 1e6:,.2f}", f"{flops / conventions['exact']:.3f}")
    console.print(table)
