"""From one step's work and time to MFU, PaLM's MFU and HFU."""

from __future__ import annotations

from dataclasses import dataclass

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops.counts import batch_flops, train_flops_per_token


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step did, over all ranks and micro-batches.

    ``tokens`` and ``attn_pairs`` are the useful ones: no padding (a token with an ignored label counts).
    The ``computed_`` ones are what the devices went through, padding included; None: the same.
    """

    tokens: int
    attn_pairs: int
    seq_len: int
    computed_tokens: int | None = None
    computed_attn_pairs: int | None = None


@dataclass(frozen=True)
class Utilization:
    """FLOPs of a step and their share of the peak; shares are None where the peak is not known.

    ``mfu``: exact model FLOPs of useful tokens. ``mfu_palm``: 6N+12LHQT of useful tokens, as if each row were
    one document. ``hfu``: FLOPs of computed tokens, recomputation included.
    """

    model_flops: float
    palm_flops: float
    hardware_flops: float
    mfu: float | None
    mfu_palm: float | None
    hfu: float | None


def utilization(
    model: ModelConfig,
    work: StepWork,
    *,
    step_time_s: float,
    peak_flops_per_s: float | None,
    recompute: RecomputeConfig | None = None,
    early_stop: bool = True,
) -> Utilization:
    """Utilization of one step.

    Args:
        step_time_s: wall time of the step, the slowest rank's.
        peak_flops_per_s: dense peak in the compute dtype, summed over every device of the run; None: unknown.
        recompute, early_stop: as for :func:`batch_flops`; they move ``hfu`` only.
    """
    assert step_time_s > 0, step_time_s
    computed_tokens = work.tokens if work.computed_tokens is None else work.computed_tokens
    computed_pairs = work.attn_pairs if work.computed_attn_pairs is None else work.computed_attn_pairs
    useful = batch_flops(model, work.tokens, work.attn_pairs).train
    palm = work.tokens * train_flops_per_token(model, work.seq_len, "palm")
    done = batch_flops(model, computed_tokens, computed_pairs, recompute, early_stop=early_stop).hardware

    def share(flops: float) -> float | None:
        return None if peak_flops_per_s is None else flops / step_time_s / peak_flops_per_s

    return Utilization(useful, palm, done, share(useful), share(palm), share(done))
