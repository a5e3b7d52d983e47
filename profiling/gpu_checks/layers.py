"""Four layers of a Llama-3-8B with its vocabulary, at 8k tokens: MFU and peak memory of each way to run them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from gpu_checks import Setting, Skipped
from gpu_checks.bed import ONE_RANK, TINY_DEMO, Bed, bed, drawn_on_device
from trainsys.config.loader import load_run
from trainsys.dryrun.step import dry_step, metered_step
from trainsys.dryrun.swap import swapped
from trainsys.flops import StepWork, mfu, step_flops
from trainsys.hardware import match_device, peak_for_run
from trainsys.layout import Layout

VARIANTS: dict[str, tuple[str, ...]] = {
    "compiled": ("train.compile=true",),
    "eager": (),
    "compiled_full": ("train.compile=true", "recompute.policy=full"),
    "selective": ("recompute.policy=selective",),
    "selective_pp": ("recompute.policy=selective++",),
    "full": ("recompute.policy=full",),
    "documents": ("data.document_mask=true",),
    "loss_chunk": ("train.loss_chunk=1024",),
}
_BASE = ("data.source=synthetic", "data.path=null", "data.document_mask=false", "recompute.policy=none")
_TOLERANCE, _WORKSPACE = 0.05, 256 << 20
"""The allocator's peak may be this share and these bytes (cuBLAS's workspace, blocks it rounds up) over the dry run's."""


def _run(at: Setting) -> tuple[str, tuple[str, ...]]:
    if at.tiny:
        return "train/demo", (*_BASE, *TINY_DEMO, "train.dtype=bf16", "train.global_batch=1")
    return "train/llama3-8b", (*_BASE, "model.n_layers=4", "train.global_batch=1", "train.micro_batch=1")


def _chunk(at: Setting, overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("train.loss_chunk=16" if at.tiny and "loss_chunk" in o else o for o in overrides)


@contextmanager
def _graphs_only(at: Setting) -> Iterator[None]:
    """Tiny: graphs are taken and not compiled, as generating code takes longer than everything else here."""
    eager = partial(torch.compile, backend="aot_eager")
    with swapped(torch, "compile", eager) if at.tiny else nullcontext():
        yield


def speed(variant: str, at: Setting) -> dict[str, Any]:
    """Seconds a step, model TFLOP/s, MFU (None without a catalogue's peak), peak GiB."""
    run, base = _run(at)
    if at.cuda:
        torch.cuda.reset_peak_memory_stats()
    with drawn_on_device(), _graphs_only(at):
        b = bed(at, run, *base, *_chunk(at, VARIANTS[variant]))
        began = time.perf_counter()
        first = float(b.step().scalars[0])
        setup_s = time.perf_counter() - began
        for _ in range(1 if at.tiny else 3):
            b.step()
        times = [_timed_step(at, b) for _ in range(2 if at.tiny else 8)]
        last = float(b.step().scalars[0])
    assert last < first, f"{variant}: one batch over and over, and the loss goes from {first} to {last}"
    seconds, data = statistics.median(times), b.batches[0]
    work = StepWork(data.real_tokens_global, data.attn_pairs_global, b.cfg.train.seq_len)
    flops = step_flops(b.cfg.model, work, b.cfg.recompute)
    found = {
        "step_s": seconds,
        "first_step_s": setup_s,
        "tokens_per_s": data.real_tokens_global / seconds,
        "model_tflops": flops.model / seconds / 1e12,
        "losses": [first, last],
    }
    if at.cuda:
        p = torch.cuda.get_device_properties(at.device)
        peak = peak_for_run(match_device(p.name, p.total_memory / 2**30, p.multi_processor_count), "bf16")
        possible = None if peak is None else peak.flops_per_s
        found |= {
            "mfu": mfu(flops.model, seconds, possible),
            "hfu": mfu(flops.hardware, seconds, possible),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return found


def _timed_step(at: Setting, b: Bed) -> float:
    if at.cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    b.step()
    if at.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def dry_run(variant: str, at: Setting) -> dict[str, Any]:
    """The dry run's peak is the allocator's; on the CPU, that of the same step with real tensors."""
    run, base = _run(at)
    cfg = load_run(run, [*ONE_RANK, *base, *_chunk(at, VARIANTS[variant]), f"train.device={at.kind}"])
    if cfg.train.compile:
        raise Skipped("a dry run compiles nothing")
    layout = Layout.resolve(cfg.parallel, 1)
    said = dry_step(cfg, layout, 0, as_cuda=at.cuda).peak_bytes
    if not at.cuda:
        real = metered_step(cfg, layout, 0).peak_bytes
        assert real == said, f"{variant}: {real} bytes with tensors, {said} without"
        return {"dry_bytes": said, "real_bytes": real}
    with drawn_on_device():
        b = bed(at, run, *base, *VARIANTS[variant])
        b.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        b.step()
        torch.cuda.synchronize()
    real = torch.cuda.max_memory_allocated()
    over = real - said
    assert -_TOLERANCE * said <= over <= _TOLERANCE * said + _WORKSPACE, (
        f"{variant}: the allocator's peak is {real / 2**30:.2f} GiB, the dry run's {said / 2**30:.2f}"
    )
    return {"dry_bytes": said, "real_bytes": real, "ratio": real / said}
