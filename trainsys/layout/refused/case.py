"""One thing that somebody wants, and one reason why it cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainsys.config.model import ModelConfig
from trainsys.config.run import ParallelConfig, RecomputeConfig, TrainConfig

if TYPE_CHECKING:
    from trainsys.layout.axes import Layout


@dataclass(frozen=True)
class Case:
    """A layout, and what is to be trained under it."""

    layout: Layout
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig

    @property
    def rows(self) -> int:
        """Sequences in one micro-batch of all data ranks."""
        return self.layout.data_world * self.train.micro_batch


@dataclass(frozen=True)
class Refusal:
    """``says`` is one line: what, where, and what would work. Asked only where ``applies``.

    ``example``: settings by dotted name, over those of `page.BASE`, that are refused for this reason and no other.
    """

    name: str
    applies: Callable[[Case], bool]
    says: Callable[[Case], str]
    example: Mapping[str, object]
