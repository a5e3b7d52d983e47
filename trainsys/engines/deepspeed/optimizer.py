"""AdamW under DeepSpeed's optimizers: it asks before it updates, and its states can be read and filled.

ZeRO wraps whatever optimizer it is given, hands it flat fp32 partitions instead of parameters, and calls its
``step`` once for each, after clipping. So an update that is turned down need not be known to ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config.run import OptimConfig
from trainsys.optim.adamw import decay_groups, moments_of


class AskingAdamW(torch.optim.AdamW):
    """``allowed`` is asked in every ``step``; while it says no, nothing changes."""

    def __init__(self, groups: Iterable[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(list(groups), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        self.allowed: Callable[[], bool] = lambda: True
        self.updates = 0
        """How many updates were made, which is what the moments' bias correction counts."""
        self.keep_gradients = False
        self.gradients: dict[Tensor, Tensor] = {}
        """Gradients of the last step, keyed by ZeRO's flattened parameters; empty unless ``keep_gradients``."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        if self.keep_gradients:
            for group in self.param_groups:
                self.gradients.update({p: p.grad.clone() for p in group["params"] if p.grad is not None})
        if self.allowed():
            super().step()

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def moments(self, param: Tensor) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of what it was given; zeros, made here, before the first update."""
        return moments_of(self, param, self.updates)

    def resume(self, updates: int) -> None:
        """The moments are now those after ``updates`` updates."""
        self.updates = updates
        for held in self.state.values():
            held["step"].fill_(float(updates))


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig, dims: dict[str, int]
) -> AskingAdamW:
    """``dims``: of the full parameters, by name."""
    return AskingAdamW(decay_groups(((p, dims[name]) for name, p in named), cfg.weight_decay), cfg)
