"""MFU by the model's own FLOPs, where the user says which model was trained."""

from __future__ import annotations

from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.flops import train_flops_per_token
from trainsys.hardware import lookup
from trainsys.profiler.trace.analyse import Options
from trainsys.profiler.trace.report import Mfu, Report
from trainsys.profiler.trace.roofline import peak_of


def add_model_mfu(
    report: Report, model: ModelConfig, seq_len: int | None, tokens_per_step: int | None, options: Options
) -> None:
    """Replace each rank's shape-based MFU by exact model FLOPs (causal, no recompute) over its mean step.

    ``tokens_per_step`` is of the whole world. Raises UserError where the traces have no steps, no world size
    or no known device: an MFU without its denominator is a guess.
    """
    assert seq_len is not None
    assert tokens_per_step is not None
    flops = train_flops_per_token(model, seq_len) * tokens_per_step
    for rank in report.ranks:
        steps = rank.breakdown.steps if rank.breakdown is not None else []
        world = max(rank.world, len(report.ranks))
        name = options.device.name if options.device else rank.peak_device
        if not steps:
            raise UserError(f"{rank.path}: no ProfilerStep in it, so no step time to take the model's FLOPs over")
        if not name:
            raise UserError(f"{rank.path}: device {rank.device!r} is not in the catalogue; name its peak with --device")
        # Products in the trace say which units did the work; training in bf16 is the rule where none is recorded.
        dtype = max(rank.products, key=lambda p: p.flops).dtype if rank.products else "c10::BFloat16"
        device = lookup(name)
        peak = peak_of(device, dtype)
        if peak is None:
            raise UserError(f"{rank.path}: {device.name} has no known peak for {dtype}")
        mean_s = sum(t.span for t in steps) / len(steps) / 1e9
        rank.mfu = Mfu(
            round(flops / world / (mean_s * peak), 6),
            f"{model.name}, exact (causal attention, no recompute), {tokens_per_step} tokens a step over {world} ranks",
            f"{device.name} {dtype} dense {peak / 1e12:g} TFLOP/s",
        )
