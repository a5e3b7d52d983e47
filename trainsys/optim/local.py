"""Plain-tensor views of parameters that FSDP2 holds as DTensors, and what of each parameter a rank updates.

AdamW and the gradient norm are elementwise or additive, so they are exact on shards; on plain tensors they
also avoid the per-operation dispatch of DTensor, which costs more than the arithmetic on small models.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainsys.models.shards import ShardSpec


def local(x: Tensor) -> Tensor:
    """The shard of ``x`` that this rank holds, sharing its storage, outside autograd."""
    return x._local_tensor.detach() if isinstance(x, DTensor) else x.detach()


def local_grad(param: nn.Parameter) -> Tensor | None:
    """The shard of the gradient that this rank holds, or None where there is none."""
    return None if param.grad is None else local(param.grad)


@dataclass(eq=False)
class Owned:
    """What of one parameter this rank updates, and keeps optimizer states for: here all that it holds."""

    param: nn.Parameter
    place: ShardSpec
    """of `weight` in the full parameter"""
    copies: int
    """how many ranks of the world update the same elements"""

    @property
    def weight(self) -> Tensor:
        """It shares the parameter's storage: what it is told, the model has."""
        return local(self.param)

    @property
    def grad(self) -> Tensor | None:
        """The finished gradient, in ``weight``'s shape; None where there is none."""
        return local_grad(self.param)
