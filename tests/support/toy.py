"""A run of one process whose model is four numbers: the real session, saver and guard in no time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from trainsys.checkpoint.ranks import Ranks
from trainsys.config.run import RunConfig
from trainsys.data import build_source
from trainsys.data.loader import StepData
from trainsys.engines.base import Judge, LocalTensor, StepResult
from trainsys.layout import Layout
from trainsys.models.shards import ShardSpec
from trainsys.parallel.mesh import Mesh
from trainsys.resilience.drain import Drain
from trainsys.resilience.lease import Lease
from trainsys.resilience.session import Session
from trainsys.telemetry.recorder import Recorder, here

LOST = float("nan")


def toy_config(out: Path, steps: int, **sections: dict[str, Any]) -> RunConfig:
    plain = {
        "name": "toy",
        "model": {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_ff": 8, "vocab": 16, "max_seq_len": 8},
        "parallel": {"dp_shard": 1},
        "data": {"source": "synthetic", "prefetch": 0},
        "train": {"steps": steps, "seq_len": 8, "global_batch": 1, "dtype": "fp32", "device": "cpu"},
        "telemetry": {"out": str(out)},
        "checkpoint": {"every": 2, "memory_dir": str(out / "memory")},
        "resilience": {"hang_timeout_s": 0, "max_anomalies": 100},
    }
    return RunConfig.model_validate(
        {name: {**plain.get(name, {}), **sections.get(name, {})} if name != "name" else "toy" for name in plain}
    )


class ToyEngine:
    """``weights`` count the updates. The update on batch ``poison`` has a finite loss and leaves no number in them;
    batches ``bad`` have a loss that is no number, whatever the weights."""

    device = torch.device("cpu")

    def __init__(self, poison: Collection[int] = (), bad: Collection[int] = ()) -> None:
        self.poison, self.bad = poison, bad
        self.weights, self.moment, self.updates = torch.zeros(4), torch.zeros(1), 0

    def train_step(self, step: int, data: StepData, judge: Judge | None = None, ask: float = 0.0) -> StepResult:
        loss = LOST if data.step in self.bad or self.weights.isnan().any() else 1.0
        applied = judge is None or judge(loss, 1.0)
        if applied:
            self.updates += 1
            self.weights += LOST if data.step in self.poison else 1.0
        return StepResult(torch.tensor([loss, 1.0]), 1e-3, torch.tensor(ask), applied)

    def state(self) -> Iterator[LocalTensor]:
        yield LocalTensor("weights", self.weights, ShardSpec.whole((4,)))
        yield LocalTensor("weights@moment", self.moment, ShardSpec.whole((1,)))

    parameters = gradients = state

    def resumed(self, updates: int) -> None:
        self.updates = updates


class ToyRun:
    """One attempt. ``said``: what the session warned of; ``session``, ``engine``: as they were left."""

    def __init__(self, cfg: RunConfig, engine: ToyEngine, **options: Any) -> None:
        self.cfg, self.engine, self.said = cfg, engine, list[str]()
        self.run_dir = Path(cfg.telemetry.out)
        self.recorder = Recorder(None, here(run_id="toy", rank=0, world=1), watch_gc=False)
        self.drain = Drain(cfg.checkpoint_folder, 60.0)
        self.lease = Lease(cfg.checkpoint_folder)
        self._options = options

    def warn(self, text: str) -> None:
        self.said.append(text)

    say = warn

    def go(self, until: Callable[[Session], bool] = lambda session: False) -> ToyRun:
        """Train to the end, or be gone, as if killed, once ``until`` says so after a step (what was being written
        is finished first, so that the test is of what a resume finds)."""
        mesh = Mesh(Layout.resolve(self.cfg.parallel, 1), torch.device("cpu"))
        with self.lease:
            self.session = Session(self.cfg, build_source(self.cfg), self.drain, self.lease, Ranks(), **self._options)
            killed = False
            try:
                with self.session as session:
                    session.attach(self.engine, mesh, self)
                    self.began = session.step, float(self.engine.weights[0])
                    while not session.over:
                        data = StepData(session.data_step, [], 1, 1, 0, 1)
                        result = self.engine.train_step(session.step, data, session.guard.judge, session.asks)
                        session.after(data, result)
                        if until(session):
                            killed = True
                            assert session._saver is not None
                            session._saver.wait()
                            raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert killed
        return self
