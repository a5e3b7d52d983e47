"""One thing that an engine can't do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainsys.config.run import RunConfig
from trainsys.layout import Layout


@dataclass(frozen=True)
class Limit:
    """``what`` is refused where ``hit`` holds, for ``reason``, which also names what would work."""

    what: str
    hit: Callable[[RunConfig, Layout], bool]
    reason: str
