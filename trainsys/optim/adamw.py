"""AdamW over this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config.run import OptimConfig
from trainsys.optim.local import Owned

MOMENTS = ("exp_avg", "exp_avg_sq")


def decay_groups(params: Iterable[tuple[Tensor, int]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer, of (parameter, dims of the full parameter): matrices decay, vectors do not."""
    decay: list[Tensor] = []
    rest: list[Tensor] = []
    for param, dims in params:
        (decay if dims >= 2 else rest).append(param)
    groups = ((decay, weight_decay), (rest, 0.0))
    return [{"params": some, "weight_decay": each} for some, each in groups if some]


def moments_of(optimizer: torch.optim.Optimizer, param: Tensor, updates: int) -> dict[str, Tensor]:
    """``exp_avg`` and ``exp_avg_sq`` of a parameter, to be read or filled; zeros, made here, before the first update.

    ``updates``: how many the optimizer has made, which its bias correction counts.
    """
    held = optimizer.state[param]
    if not held:
        held["step"] = torch.tensor(float(updates), device=param.device)
        held.update({moment: torch.zeros_like(param.detach()) for moment in MOMENTS})
    return {moment: held[moment] for moment in MOMENTS}


class LocalAdamW:
    """``torch.optim.AdamW`` (Loshchilov & Hutter 2019) on what this rank owns of every named parameter.

    Matrices decay, vectors (norms, biases) do not; the full shape decides, so a shard decays as the whole
    does. Moments are fp32 like the parameters, ``state(name)`` gives them for checkpoints.
    """

    def __init__(self, owned: Mapping[str, Owned], cfg: OptimConfig) -> None:
        self._owned = dict(owned)
        # Leaves that share storage with the weights: what they are told, the model has.
        self._leaves = {name: nn.Parameter(o.weight) for name, o in self._owned.items() if o.weight.numel()}
        dims = ((leaf, len(self._owned[name].place.full_shape)) for name, leaf in self._leaves.items())
        groups = decay_groups(dims, cfg.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        self.updates = 0
        """How many updates were made, which is what the moments' bias correction counts."""

    def step(self, lr: float) -> None:
        self.updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, leaf in self._leaves.items():
            leaf.grad = self._owned[name].grad
        self._optimizer.step()
        for leaf in self._leaves.values():
            leaf.grad = (
                None  # or the old gradients would be held beside the new ones all through the next step
            )

    def state(self, name: str) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of a parameter for a checkpoint to read or fill; made where there is
        no update yet, and empty tensors where this rank holds nothing of the parameter."""
        leaf = self._leaves.get(name)
        if leaf is None:
            nothing = torch.zeros_like(self._owned[name].weight)
            return dict.fromkeys(MOMENTS, nothing)
        return moments_of(self._optimizer, leaf, self.updates)

    def resume(self, updates: int) -> None:
        """The moments are now those after ``updates`` updates."""
        self.updates = updates
        for held in self._optimizer.state.values():
            held["step"].fill_(float(updates))
