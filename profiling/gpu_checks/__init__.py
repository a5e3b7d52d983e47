"""What ``gpu_day.py`` asks of a device: one function a question, grouped by what they are about.

A check takes a :class:`Setting` and returns what it found, as plain data. It raises ``AssertionError`` where the answer
is wrong, and :class:`Skipped` where this machine cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Skipped(Exception):
    """A check that says nothing here, and why."""


@dataclass(frozen=True)
class Setting:
    """Where checks run. ``tiny``: at sizes that try the code and measure nothing."""

    cuda: bool
    tiny: bool

    @property
    def kind(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def seconds(self, on_device: float) -> float:
        """How long something is measured."""
        return 0.01 if self.tiny else on_device


@dataclass(frozen=True)
class Check:
    name: str
    limit_s: float
    """What it may take on a GPU, starting included."""
    run: Callable[[Setting], dict[str, Any]]
    needs_cuda: bool = False
