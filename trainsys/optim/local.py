"""Plain-tensor views of parameters that FSDP2 holds as DTensors.

AdamW and the gradient norm are elementwise or additive, so they are exact on shards; on plain tensors they
also avoid the per-operation dispatch of DTensor, which costs more than the arithmetic on small models.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """The shard of ``x`` that this rank holds, sharing its storage, outside autograd."""
    return x._local_tensor.detach() if isinstance(x, DTensor) else x.detach()


def local_grad(param: nn.Parameter) -> Tensor | None:
    """The shard of the gradient that this rank holds, or None where there is none."""
    return None if param.grad is None else local(param.grad)
