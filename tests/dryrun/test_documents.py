"""A step of long rows of documents makes no tensor of all pairs, under any flavour or policy; it costs what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.apart import apart
from support.dry_cases import run, world
from trainsys.config.run import RecomputeConfig, RunConfig
from trainsys.dryrun import meter
from trainsys.dryrun.step import RankStep, dry_step
from trainsys.flops import causal_pairs, packed_pairs
from trainsys.layout import Layout
from trainsys.memory import stream_attention
from trainsys.ops import attention_seam
from trainsys.ops.attention_kernels import ReferenceKernel
from trainsys.parallel.context import blocks
from trainsys.planner.exact import Place, step_flops

SEQ, LENGTH = 4096, 500
WIDEST = SEQ * 96
"""Elements of the largest tensor there should be, the feed-forward's or, on 80 of vocabulary, the loss's."""
STREAMED = RecomputeConfig(stream_attention=1024)


def _run(**options: Any) -> RunConfig:
    recompute = options.pop("recompute", "none")
    cfg = run(
        train={"seq_len": SEQ, "global_batch": 1, **options.pop("train", {})},
        data={"document_mask": True, "document_length": LENGTH},
        model={"n_layers": 1, "max_seq_len": SEQ, **options.pop("model", {})},
        **({"recompute": recompute} if isinstance(recompute, str) else {}),
        **options,
    )
    return cfg if isinstance(recompute, str) else cfg.model_copy(update={"recompute": recompute})


def _step(cfg: RunConfig, dense: bool = False) -> tuple[RankStep, int]:
    """The dry step of the last rank, and the elements of the largest tensor that it made."""
    largest = 0

    class Watched(meter.Meter):
        def _made(self, x: torch.Tensor) -> None:
            nonlocal largest
            largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            super()._made(x)

    from trainsys.dryrun import step

    step.Meter = Watched  # type: ignore[misc]  # in a process of its own
    if dense:
        for module in (attention_seam, blocks, stream_attention):
            module.kernel_for = lambda q: ReferenceKernel()  # type: ignore[attr-defined]
    layout = Layout.resolve(cfg.parallel, world(cfg))
    return dry_step(cfg, layout, layout.world - 1), largest


CASES: dict[str, RunConfig] = {
    **{p: _run(recompute=p) for p in ("none", "selective", "selective++", "full")},
    "streamed": _run(recompute=STREAMED),
    "window": _run(model={"sliding_window": 64}),
    **{
        f"cp-{f}": _run(cp=2, flavour=f)
        for f in ("ring", "all_gather", "pass_q", "token_ring", "dist_flash", "ulysses")
    },
    "cp-two_d": _run(cp=4, flavour="two_d", context={"head_degree": 2}),
    "cp-ring-selective++": _run(cp=2, recompute="selective++"),
    "pp": _run(pp=2, model={"n_layers": 2}, train={"global_batch": 2}),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_no_tensor_of_all_pairs(name: str) -> None:
    _, largest = apart(_step, CASES[name])
    assert 0 < largest <= WIDEST


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["none", "streamed", "cp-ring"])
def test_a_mask_of_all_pairs_would_be_seen(name: str) -> None:
    _, largest = apart(_step, CASES[name], True)
    assert largest > 2 * WIDEST


def test_attention_costs_what_documents_hold() -> None:
    cfg = CASES["none"]
    (found, _), (whole, _) = (apart(_step, c) for c in (cfg, _longer(cfg, SEQ)))
    each = 3 * 4 * cfg.model.n_heads * cfg.model.dim_per_head
    pairs = packed_pairs([LENGTH] * (SEQ // LENGTH) + [SEQ % LENGTH])
    assert whole.total_flops - found.total_flops == each * (causal_pairs(SEQ) - pairs)
    assert step_flops(Place(cfg, Layout(), 0)) == found.total_flops
    assert found.peak_bytes <= whole.peak_bytes * 1.01, "documents need no memory of their own"


def _longer(cfg: RunConfig, length: int) -> RunConfig:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"document_length": length})})
