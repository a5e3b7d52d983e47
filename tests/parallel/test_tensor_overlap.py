"""Tensor parallelism in parts sends and keeps what whole collectives do. That its answer is the same is in the
parity tests, what it hides in `test_overlap`."""

from __future__ import annotations

import torch
from test_parity import config

from support.parity import train_on_this_rank
from support.ranks import run_ranks
from support.saved import saved_bytes
from trainsys.config.run import RunConfig
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.parallelize import parallelize


def _sent(cfg: RunConfig) -> tuple[int, int]:
    trace = train_on_this_rank(cfg, 1)
    return trace.sent_bytes["tp"], trace.calls["tp"]


def _kept(cfg: RunConfig) -> int:
    """Bytes of distinct storages that forward keeps, parameters left out."""
    mesh = Mesh(Layout(tp=2), torch.device("cpu"))
    model = parallelize(cfg, mesh).module
    return saved_bytes(model, torch.zeros(1, 16, dtype=torch.int64), torch.arange(16)[None])


def test_bytes_sent_and_kept_are_those_of_whole_collectives() -> None:
    whole, parts = (config({"tp": 2, "overlap": {"tensor": on}}) for on in (False, True))
    for (sent, calls), (sent_in_parts, calls_in_parts) in zip(
        run_ranks(2, _sent, whole), run_ranks(2, _sent, parts), strict=True
    ):
        assert sent_in_parts == sent
        assert calls_in_parts == calls  # on two ranks a passage has one hop
    assert run_ranks(2, _kept, parts) == run_ranks(2, _kept, whole)
