"""What Megatron-Core can't run."""

from __future__ import annotations

from trainsys.capabilities.base import Limit

MEGATRON: tuple[Limit, ...] = ()
