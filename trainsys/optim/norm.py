"""The gradient norm over every axis, each element counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def square_sum(grads: Iterable[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """Sum of squares of this rank's gradient shards, fp32 scalar.

    Each item is (shard, copies): how many ranks of the world hold that same shard. Dividing by the copies
    lets one plain sum over the whole world give the square of the global norm, whatever the layout.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for grad, copies in grads:
        if grad.numel():
            by_copies.setdefault(copies, []).append(grad)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, shards in by_copies.items():
        norms = torch.stack([n.float() for n in torch._foreach_norm(shards, 2)])
        total += norms.square().sum() / copies
    return total


def clip_(grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale ``grads`` in place by min(1, max_norm / norm), without reading ``norm`` back on a device.

    A non-finite norm leaves the gradients as they are: the caller decides what such a step means.
    """
    if not grads:
        return
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if reads_back(norm):
        if not bool(scale < 1.0):
            return
        torch._foreach_mul_(list(grads), float(scale))
    else:
        torch._foreach_mul_(list(grads), torch.where(torch.isfinite(scale), scale, 1.0))


def reads_back(norm: Tensor) -> bool:
    """Whether the host looks at the norm: on a CPU that is no wait, and mostly saves the product."""
    return norm.device.type == "cpu"
