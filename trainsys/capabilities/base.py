"""One thing that an engine can't do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trainsys.config.run import RunConfig
from trainsys.layout import Layout


@dataclass(frozen=True)
class Limit:
    """``what`` is refused where ``hit`` holds, for ``reason``, which also names what would work.

    ``example``: settings by dotted name, over those of `trainsys.layout.refused.page.BASE`, that hit this one alone.
    """

    what: str
    hit: Callable[[RunConfig, Layout], bool]
    reason: str
    example: Mapping[str, object] = field(default_factory=dict)
