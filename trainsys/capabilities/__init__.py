"""What each engine can run, as tables: asked before anything heavy is imported."""

from __future__ import annotations

from trainsys.capabilities.base import Limit
from trainsys.capabilities.deepspeed import DEEPSPEED
from trainsys.capabilities.megatron import MEGATRON
from trainsys.config.engines import EngineName
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.layout import Layout

# What no layout of the native engine can do is in Layout.validate, and holds for the others too.
LIMITS: dict[EngineName, tuple[Limit, ...]] = {"native": (), "deepspeed": DEEPSPEED, "megatron": MEGATRON}


def unable(cfg: RunConfig, layout: Layout) -> list[str]:
    """Why ``cfg.engine`` can't run this; empty: it can."""
    return [
        f"engine={cfg.engine}: {limit.what}: {limit.reason}"
        for limit in LIMITS[cfg.engine]
        if limit.hit(cfg, layout)
    ]


def refuse_unable(cfg: RunConfig, layout: Layout) -> None:
    """UserError with the first reason why ``cfg.engine`` can't run this."""
    for reason in unable(cfg, layout):
        raise UserError(reason)
