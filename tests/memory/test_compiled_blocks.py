"""What torch.compile makes of a block under each policy: counted, since a block that is left eager is only slow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from support.apart import apart
from support.ranks import run_ranks
from trainsys.config.run import RunConfig
from trainsys.layout import Layout
from trainsys.ops.documents import Documents
from trainsys.parallel import parallelize as parallelizing
from trainsys.parallel.mesh import Mesh

SMALL = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab": 64, "max_seq_len": 32}
LAYERS = 9
"""Dynamo gives up on code that it has compiled for 8 different objects."""


def _config(recompute: dict[str, object], parallel: dict[str, object], layers: int) -> RunConfig:
    train = {"seq_len": 32, "global_batch": 2, "micro_batch": 2, "device": "cpu", "dtype": "fp32", "compile": True}
    sections = {"recompute": recompute, "parallel": parallel, "train": train}
    return RunConfig.model_validate({"model": {"n_layers": layers, **SMALL}, **sections})


def _compiled(
    recompute: dict[str, object],
    parallel: dict[str, object],
    layers: int = LAYERS,
    rows: Sequence[list[int] | None] = (None,),
    compiles: bool = True,
) -> tuple[int, int, float]:
    """Graphs, operations in them, and the largest gradient of a backward of each of ``rows``, a micro-batch's documents
    by their lengths."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    cfg = _config(recompute, parallel, layers)
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"compile": compiles})})
    mesh = Mesh(Layout.resolve(cfg.parallel, int(os.environ.get("WORLD_SIZE", 1))), torch.device("cpu"))
    real = torch.compile
    torch.compile = partial(real, backend=counter)  # type: ignore[assignment]
    try:
        model = parallelizing.parallelize(cfg, mesh)
    finally:
        torch.compile = real
    length = 32 // mesh["cp"].size
    tokens = torch.arange(2 * length).view(2, length) % 64
    for lengths in rows:
        docs = None if lengths is None else _documents(lengths)
        model.module(tokens, torch.arange(length).expand(2, -1), docs).float().pow(2).mean().backward()
    model.finish_gradients()
    grads = [p.grad for p in model.module.parameters()]
    assert all(g is not None for g in grads)
    return counter.frame_count, counter.op_count, max(float(g.abs().max()) for g in grads if g is not None)


def _documents(lengths: list[int]) -> Documents:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Documents.of(ids.expand(2, -1))


PACKED = [[32], [7, 25], [1, 3, 20, 8]]


def _packed() -> list[tuple[int, int, float]]:
    each = ((PACKED[:1], True), (PACKED, True), (PACKED, False))
    return [_compiled({}, {}, 2, rows, compiles) for rows, compiles in each]


def test_documents_of_other_lengths_are_the_same_graphs() -> None:
    one, all_lengths, eager = apart(_packed)
    assert one[0] == all_lengths[0] <= 4
    assert eager[0] == 0
    assert all_lengths[2] == pytest.approx(eager[2], rel=1e-4)


def _each(cases: list[dict[str, object]]) -> list[tuple[int, int, float]]:
    return [_compiled(case, {}) for case in cases]


def test_one_graph_serves_all_layers_under_every_policy() -> None:
    plain, full, selective, seam = apart(
        _each, [{"policy": p} for p in ("none", "full", "selective", "selective++")]
    )
    graphs, operations, gradient = plain
    assert graphs == 1
    assert gradient > 0
    assert full == plain, "a recomputed block is the same graph as one that is not"
    assert selective[0] == 1
    assert selective[1] > 0.8 * operations
    # Attention through the seam is not compiled: what is before and after it is.
    assert seam[0] <= 4
    assert seam[1] > 0.7 * operations
    assert {round(g / gradient, 4) for *_, g in (selective, seam)} == {1.0}


@pytest.mark.slow
def test_streamed_blocks_share_their_graphs() -> None:
    plain, every, ffn, attn = apart(
        _each, [{"policy": "none"}, {"policy": "every_n"}, {"stream_ffn": 2}, {"stream_attention": 2}]
    )
    assert every == plain
    for streamed in (ffn, attn):
        assert streamed[0] <= 4
        assert streamed[1] > 0.4 * plain[1]
        assert streamed[2] == pytest.approx(plain[2], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["ring", "ulysses"])
def test_context_parallel_layers_share_their_graphs(flavour: str) -> None:
    parallel = {"cp": 2, "context": {"flavour": flavour}}
    few, many = (run_ranks(2, _compiled, {}, parallel, layers) for layers in (2, LAYERS))
    assert {r[:2] for r in many} == {r[:2] for r in few}
    graphs, operations, gradient = many[0]
    assert graphs >= 1
    assert operations > 25
    assert gradient > 0
