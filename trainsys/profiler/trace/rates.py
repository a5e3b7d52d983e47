"""Peaks from the catalogue put beside what was measured: roofline, MFU. Apart, so that workers need no catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainsys.errors import UserError
from trainsys.hardware import Device, lookup, match_device
from trainsys.profiler.trace.report import Mfu, RankReport, Report
from trainsys.profiler.trace.roofline import peak_of, with_roofline

if TYPE_CHECKING:
    from trainsys.config.model import ModelConfig


def add_peaks(rank: RankReport, memory_bytes: int, device_name: str | None) -> None:
    """Fill in what needs the device's peaks; an unknown device leaves them empty. ``device_name`` overrides."""
    if device_name:
        device: Device | None = lookup(device_name)
    else:
        device = match_device(rank.device, memory_bytes / 2**30 or None) if rank.device else None
    if device is None:
        return
    rank.peak_device = device.name
    rank.products = with_roofline(rank.products, device)
    rank.mfu = _mfu(rank, device)


def _main_dtype(rank: RankReport) -> str:
    """The dtype that did most FLOPs. Training in bf16 is the rule where no product was recorded."""
    by_dtype: dict[str, int] = {}
    for row in rank.products:
        by_dtype[row.dtype] = by_dtype.get(row.dtype, 0) + row.flops
    return max(by_dtype, key=lambda d: by_dtype[d], default="c10::BFloat16")


def _mfu(rank: RankReport, device: Device) -> Mfu | None:
    """Matrix-product FLOPs from shapes over the span, at the peak of the dtype that did most of them."""
    span_ns = rank.breakdown.whole.span if rank.breakdown is not None else 0
    dtype = _main_dtype(rank)
    peak = peak_of(device, dtype)
    if not rank.work.products or not span_ns or peak is None:
        return None
    return Mfu(
        round(rank.work.products / (span_ns / 1e9 * peak), 6),
        "matmuls from recorded shapes, recompute included, no attention, no convolutions",
        f"{device.name} {dtype} dense {peak / 1e12:g} TFLOP/s",
    )


def common_device(report: Report) -> Device | None:
    """The catalogue's device of all ranks, if they have one in common."""
    names = {r.peak_device for r in report.ranks}
    name = names.pop() if len(names) == 1 else ""
    return lookup(name) if name else None


def add_model_mfu(report: Report, model: ModelConfig, seq_len: int, tokens_per_step: int) -> None:
    """Replace each rank's shape-based MFU by exact model FLOPs (causal, no recompute) over its mean step.

    ``tokens_per_step`` is of the whole world. Raises UserError where the traces have no steps or no known
    device: an MFU without its denominator is a guess.
    """
    # A third of the start-up, for those who give a model only.
    from trainsys.flops import train_flops_per_token

    flops = train_flops_per_token(model, seq_len) * tokens_per_step
    for rank in report.ranks:
        steps = rank.breakdown.steps if rank.breakdown is not None else []
        world = report.world
        if not steps:
            raise UserError(
                f"{rank.path}: no ProfilerStep in it, so no step time to take the model's FLOPs over"
            )
        if not rank.peak_device:
            raise UserError(
                f"{rank.path}: device {rank.device!r} is not in the catalogue; name its peak with --device"
            )
        device, dtype = lookup(rank.peak_device), _main_dtype(rank)
        peak = peak_of(device, dtype)
        if peak is None:
            raise UserError(f"{rank.path}: {device.name} has no known peak for {dtype}")
        mean_s = sum(t.span for t in steps) / len(steps) / 1e9
        rank.mfu = Mfu(
            round(flops / world / (mean_s * peak), 6),
            f"{model.name}, exact (causal attention, no recompute), {tokens_per_step} tokens per step over {world} ranks",
            f"{device.name} {dtype} dense {peak / 1e12:g} TFLOP/s",
        )
