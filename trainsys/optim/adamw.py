"""AdamW over this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainsys.config.run import OptimConfig
from trainsys.optim.local import local, local_grad

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalAdamW:
    """``torch.optim.AdamW`` (Loshchilov & Hutter 2019) on the local shard of every named parameter.

    Matrices decay, vectors (norms, biases) do not; the full shape decides, so a shard decays as the whole
    does. Moments are fp32 like the parameters, ``state(name)`` gives them for checkpoints.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig) -> None:
        self._params = dict(named)
        # A leaf that shares storage with the shard: what it is told, the model has.
        self._leaves = {name: nn.Parameter(local(p)) for name, p in self._params.items() if local(p).numel()}
        decay = [leaf for name, leaf in self._leaves.items() if self._params[name].dim() >= 2]
        rest = [leaf for name, leaf in self._leaves.items() if self._params[name].dim() < 2]
        groups = [
            {"params": params, "weight_decay": wd}
            for params, wd in ((decay, cfg.weight_decay), (rest, 0.0))
            if params
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        self.updates = 0
        """How many updates were made, which is what the moments' bias correction counts."""

    def step(self, lr: float) -> None:
        self.updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, leaf in self._leaves.items():
            leaf.grad = local_grad(self._params[name])
        self._optimizer.step()

    def state(self, name: str) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of a parameter for a checkpoint to read or fill; made where there is
        no update yet, and empty tensors where this rank holds nothing of the parameter."""
        leaf = self._leaves.get(name)
        if leaf is None:
            nothing = torch.zeros_like(local(self._params[name]))
            return dict.fromkeys(MOMENTS, nothing)
        held = self._optimizer.state[leaf]
        if not held:
            held["step"] = torch.tensor(float(self.updates), device=leaf.device)
            held.update({moment: torch.zeros_like(leaf) for moment in MOMENTS})
        return {moment: held[moment] for moment in MOMENTS}

    def resume(self, updates: int) -> None:
        """The moments are now those after ``updates`` updates."""
        self.updates = updates
        for held in self._optimizer.state.values():
            held["step"].fill_(float(updates))
