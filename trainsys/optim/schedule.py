"""The learning rate of a step: a pure function of the step, so that a resume needs no state."""

from __future__ import annotations

import math

from trainsys.config.run import OptimConfig


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the 0-based ``step`` of a run of ``steps``.

    Linear warm-up from ``lr / warmup_steps``, then ``cosine`` or ``linear`` down to ``min_lr_ratio * lr``
    at the last step; ``wsd`` (warm-up, stable, decay: Hu et al. 2024) holds ``lr`` and falls linearly over
    the last ``decay_steps`` (0: not at all; None: a tenth of the run, after the warm-up); ``constant`` holds it.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    floor = cfg.min_lr_ratio
    last = max(1, steps - 1)
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "wsd":
        length = cfg.decay_steps
        if length is None:
            length = max(1, min(steps // 10, last - cfg.warmup_steps))
        done = min(1.0, max(0.0, (step - (last - length)) / length)) if length else 0.0
        return cfg.lr * (1.0 - (1.0 - floor) * done)
    done = min(1.0, (step - cfg.warmup_steps) / max(1, last - cfg.warmup_steps))
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1.0 - done
    return cfg.lr * (floor + (1.0 - floor) * share)
