"""Dry runs of all cases of `support.dry_cases`, made once a session in one forked process."""

from __future__ import annotations

import traceback
from functools import cache

from support.apart import apart
from support.dry_cases import CASES, world
from trainsys.config.run import RunConfig
from trainsys.dryrun.ranks import distinct_ranks
from trainsys.dryrun.step import RankStep, dry_step
from trainsys.layout import Layout


def dry(cfg: RunConfig) -> list[RankStep]:
    """One rank of each kind, in this process."""
    layout = Layout.resolve(cfg.parallel, world(cfg))
    return [dry_step(cfg, layout, rank) for rank in distinct_ranks(cfg, layout)]


@cache
def dry_cases() -> dict[str, list[RankStep] | str]:
    """By name; the traceback of one that failed."""
    return apart(_all)


def of_case(name: str) -> list[RankStep]:
    found = dry_cases()[name]
    assert not isinstance(found, str), found
    return found


def _all() -> dict[str, list[RankStep] | str]:
    found: dict[str, list[RankStep] | str] = {}
    for name, cfg in CASES.items():
        try:
            found[name] = dry(cfg)
        except Exception:
            found[name] = traceback.format_exc()
    return found
