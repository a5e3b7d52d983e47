"""AdamW over this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainsys.config.run import OptimConfig
from trainsys.optim.local import local, local_grad


class LocalAdamW:
    """``torch.optim.AdamW`` (Loshchilov & Hutter 2019) on the local shard of every named parameter.

    Matrices decay, vectors (norms, biases) do not; the full shape decides, so a shard decays as the whole
    does. Moments are fp32 like the parameters, ``moments(name)`` gives them for checkpoints.
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

    def step(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, leaf in self._leaves.items():
            leaf.grad = local_grad(self._params[name])
        self._optimizer.step()

    def moments(self, name: str) -> dict[str, Tensor]:
        """``exp_avg``, ``exp_avg_sq`` (local shapes) and ``step`` of a parameter; empty before the first step."""
        leaf = self._leaves.get(name)
        return {} if leaf is None else dict(self._optimizer.state[leaf])
