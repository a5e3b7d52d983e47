"""A step's FLOPs on the hot path: the formulas of ``trainsys.flops`` walk every layer; all of them are linear."""

from __future__ import annotations

from trainsys.config.model import ModelConfig
from trainsys.config.run import RecomputeConfig
from trainsys.flops import StepFlops, StepWork, step_flops
from trainsys.telemetry.events import Flops


class FlopsMeter:
    """``step_flops`` of one model and one policy, in a microsecond: FLOPs a token and a query-key pair, taken once."""

    def __init__(self, model: ModelConfig, seq_len: int, recompute: RecomputeConfig | None = None) -> None:
        def one(tokens: int, pairs: int) -> StepFlops:
            return step_flops(model, StepWork(tokens=tokens, attn_pairs=pairs, seq_len=seq_len), recompute)

        self._token, self._pair = one(1, 0), one(0, 1)

    def __call__(self, tokens: int, attn_pairs: int, computed_tokens: int) -> Flops:
        """FLOPs of a step over all ranks, from their real tokens and the pairs that see
        each other; ``computed_tokens`` include padding."""
        token, pair = self._token, self._pair
        return Flops(
            model=tokens * token.model + attn_pairs * pair.model,
            palm=tokens * token.palm,
            hardware=computed_tokens * token.hardware + attn_pairs * pair.hardware,
        )
