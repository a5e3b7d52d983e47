"""From the host's memory to a device without making the host wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x``, a tensor of the host, on ``device``. CUDA copies from pageable memory only after all that was queued
    before it, and the host waits that long; from pinned memory the copy is queued like a kernel."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
