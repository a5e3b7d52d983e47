"""What forward keeps for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes of distinct storages that forward keeps, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*inputs)
    return sum(sizes.values())
