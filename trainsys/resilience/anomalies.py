"""Losses that are no number or jump: whether to apply the update, on every rank alike.

The loss and gradient norm that come in are sums over the whole world, equal on every rank to the bit, and the
history they are compared with is in the checkpoint: so every rank decides alike without a word, before and
after a resume.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from trainsys.config.run import ResilienceConfig
from trainsys.errors import UserError
from trainsys.rank_lists import rank_numbers

Action = Literal["skip", "rollback", "stop"]
_MIN_HISTORY = 8
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
# A loss that hardly moves has a deviation of nothing: then this share of the median is taken for it.
_FLOOR = 0.005
_NO_LABELS = "no token of the global batch has a label: what follows each is another document, or padding"


@dataclass(frozen=True)
class Anomaly:
    """What was wrong with a step, and what is done about it."""

    step: int
    data_step: int
    loss: float
    grad_norm: float
    reason: str
    action: Action


class Guard:
    """Judges each step's loss and gradient norm; ``last`` is what was wrong with the latest, or None.

    A loss spikes when it is more than ``spike`` robust standard deviations (1.4826 MAD) above the median of the
    last ``window`` applied losses, of which there must be eight. ``file``: where each anomaly becomes a line of
    JSON with the samples of its batch (rank 0's; None elsewhere).
    """

    def __init__(self, cfg: ResilienceConfig, file: Path | None = None) -> None:
        self.cfg, self.file = cfg, file
        self.losses: deque[float] = deque(maxlen=cfg.window)
        self.last: Anomaly | None = None
        self.labels = 1
        """Tokens of the next global batch that are to be predicted: without any, its loss is no number."""
        self._recent: deque[int] = deque()
        self._at = (0, 0)

    def at(self, step: int, data_step: int) -> None:
        """The step that comes next, and which global batch it trains on."""
        self._at = (step, data_step)
        self.last = None

    def resume(self, losses: Iterable[float]) -> None:
        """Go on with the history that a checkpoint kept."""
        self.losses.clear()
        self.losses.extend(losses)

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether to apply the update. UserError where anomalies come too often, or one is to stop the run."""
        reason, action = self._weigh(loss, grad_norm)
        if not reason:
            self.losses.append(loss)
            return True
        step, data_step = self._at
        self.last = Anomaly(step, data_step, loss, grad_norm, reason, action)
        self._recent.append(data_step)
        while self._recent[0] <= data_step - self.cfg.window:
            self._recent.popleft()
        return False

    def record(self, samples: list[int]) -> None:
        """Write the latest anomaly down, with the sample numbers of its global batch."""
        assert self.last is not None
        if self.last.reason == _NO_LABELS:
            self.last = replace(self.last, reason=f"{_NO_LABELS} (samples {rank_numbers(samples)})")
        if self.file is None:
            return
        line = (
            json.dumps({**asdict(self.last), "samples": samples}) + "\n"
        )  # NaN and Infinity: as Python reads them
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(line)
            out.flush()
            os.fsync(out.fileno())

    def check(self) -> None:
        """UserError where the latest anomaly, or how many there were, ends the run."""
        if self.last is None:
            return
        where = f"step {self.last.step} (batch {self.last.data_step}): {self.last.reason}"
        if self.last.action == "stop":
            raise UserError(f"{where}, and resilience says stop; skip or rollback would go on")
        if len(self._recent) > self.cfg.max_anomalies:
            cause = (
                "the data are at fault: use longer documents, data.packing=concat or a larger train.global_batch"
                if self.last.reason.startswith(_NO_LABELS)
                else "the run diverges; try a lower optim.lr"
            )
            raise UserError(
                f"{where}; {len(self._recent)} such steps within {self.cfg.window} are more than "
                f"resilience.max_anomalies={self.cfg.max_anomalies}: {cause}"
            )

    def _weigh(self, loss: float, grad_norm: float) -> tuple[str, Action]:
        if not self.labels:
            return _NO_LABELS, self.cfg.nonfinite
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}", self.cfg.nonfinite
        if self.cfg.spike and len(self.losses) >= _MIN_HISTORY:
            middle = median(self.losses)
            spread = median(abs(x - middle) for x in self.losses) * _MAD_TO_SIGMA
            limit = middle + self.cfg.spike * max(spread, _FLOOR * abs(middle))
            if loss > limit:
                return f"loss {loss:.4g} spikes over {limit:.4g}", self.cfg.on_spike
        return "", "skip"
