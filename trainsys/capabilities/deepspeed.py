"""What DeepSpeed can't run."""

from __future__ import annotations

from trainsys.capabilities.base import Limit

DEEPSPEED: tuple[Limit, ...] = ()
