"""From what one optimizer step went through to the FLOPs behind MFU, PaLM's MFU and HFU."""

from __future__ import annotations

from dataclasses import dataclass

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops.counts import batch_flops, train_flops_per_token

CONVENTIONS = {
    "mfu": "3 x forward matmuls of real tokens; attention counts the pairs that see each other; no recompute",
    "mfu_palm": "6N + 12LHQT a real token (PaLM, appendix B); N active, without an untied input embedding",
    "hfu": "as mfu, but for padding too, and with the products that recomputation repeats",
}
"""What each utilization of a run counts, in a line: what a report prints beside the number."""


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step went through, over all ranks and micro-batches.

    ``tokens`` and ``attn_pairs`` are the useful ones: no padding (a token with an ignored label counts).
    The ``computed_`` ones are what the devices went through, padding included; None: the same.
    """

    tokens: int
    attn_pairs: int
    seq_len: int
    computed_tokens: int | None = None
    computed_attn_pairs: int | None = None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over all ranks, by the three counts of :data:`CONVENTIONS`."""

    model: float
    palm: float
    hardware: float


def step_flops(
    model: ModelConfig,
    work: StepWork,
    recompute: RecomputeConfig | None = None,
    *,
    early_stop: bool = True,
) -> StepFlops:
    """The FLOPs of one step. As in :func:`batch_flops`, ``recompute`` and ``early_stop`` move ``hardware``.

    ``palm`` takes every row for one document of ``seq_len`` tokens, as the formula does.
    """
    tokens = work.tokens if work.computed_tokens is None else work.computed_tokens
    pairs = work.attn_pairs if work.computed_attn_pairs is None else work.computed_attn_pairs
    return StepFlops(
        model=batch_flops(model, work.tokens, work.attn_pairs).train,
        palm=work.tokens * train_flops_per_token(model, work.seq_len, "palm"),
        hardware=batch_flops(model, tokens, pairs, recompute, early_stop=early_stop).hardware,
    )


def mfu(flops: float, step_time_s: float, peak_flops_per_s: float | None) -> float | None:
    """Share of the peak that ``flops`` in ``step_time_s`` is; None where the peak is unknown, never a guess.

    Args:
        flops: of the whole step, by any convention: the result is that convention's utilization.
        peak_flops_per_s: dense, in the compute dtype, of every device of the run together.
    """
    assert step_time_s > 0, step_time_s
    return None if peak_flops_per_s is None else flops / step_time_s / peak_flops_per_s
