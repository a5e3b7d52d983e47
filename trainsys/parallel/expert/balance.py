"""How many tokens each expert was chosen by, over all ranks, and the bias that evens it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from trainsys.comm import ops
from trainsys.models.router import Router
from trainsys.parallel.expert.apply import moe_layers
from trainsys.parallel.mesh import Mesh


class ExpertBalance:
    """Balance of all MoE layers that this rank has a part in, over the ranks that hold different tokens."""

    def __init__(self, models: Iterable[nn.Module], mesh: Mesh) -> None:
        self._routers: dict[str, Router] = {
            f"{name}.router": moe.router for model in models for name, moe in moe_layers(model)
        }
        # Sums of integers are exact, so two steps over groups that exist do what one over their product would.
        self._axes = mesh["fsdp"], mesh["dp_replicate"]

    def begin_step(self) -> None:
        """Forget the load of the step before."""
        for router in self._routers.values():
            router.load.zero_()

    def load(self) -> dict[str, Tensor]:
        """Choices since ``begin_step``, by router: ``[E + 1] int64``, the last one those that capacity dropped.

        Of the whole global batch, equal on every rank. All of those ranks must call it.
        """
        if not self._routers:
            return {}
        total = torch.stack([r.load for r in self._routers.values()])
        for axis in self._axes:
            ops.all_reduce_(total, axis)
        return dict(zip(self._routers, total, strict=True))

    def update(self) -> None:
        """Move each bias by the rate, up where an expert had less than the mean, down where it had more
        (Wang et al. 2024, algorithm 1). Does nothing, and sends nothing, where balance is not by bias."""
        if not any(r.expert_bias is not None for r in self._routers.values()):
            return
        for name, load in self.load().items():
            router, chosen = self._routers[name], load[:-1]
            assert router.expert_bias is not None
            # Compared as integers: sum over E of what the mean would be, so nothing is rounded.
            lack = (chosen.sum() - chosen * len(chosen)).sign()
            router.expert_bias += router.cfg.bias_update_rate * lack

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps: ``layers.{i}.ffn.router.expert_bias [E]``, equal on every rank."""
        for name, router in self._routers.items():
            if router.expert_bias is not None:
                yield f"{name}.expert_bias", router.expert_bias
