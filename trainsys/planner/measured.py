"""Seconds that a published step took: as printed, from its throughput, or from the FLOP/s or MFU it claims.

A claim is read by the convention of PaLM (Chowdhery et al. 2022, appendix B), which most publications share: model
FLOPs, 6 a parameter that multiplies, attention's whole square (its half where the row says so), no recomputation.
Hardware FLOPs, where the row says so, are not read. Conventions that it does not tell differ by a tenth and more, so
claims are only compared with: `calibrate` fits to times and throughputs alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trainsys.planner.cases import Array, Cases
from trainsys.planner.runs_csv import Run

_HARDWARE = re.compile(r"hardware|hfu|recompu|4.pass", re.I)
_HALVED = re.compile(r"halved|(?<!non)(?<!non[- ])causal", re.I)


def measured_seconds(cases: Cases, runs: Sequence[Run]) -> Array:
    """One number a row of ``cases``, which are ``runs`` in their order; NaN where a row says none of them."""
    seconds = np.asarray([r.step_s for r in runs], float)
    tokens = cases.global_batch * cases.seq
    with np.errstate(invalid="ignore"):
        flops = _linear_flops(cases) + _attention_flops(cases, runs)
        claimed = tokens * flops / (cases.world * _claimed_rate(cases, runs))
    return np.where(np.isnan(seconds), claimed, seconds)


def _linear_flops(c: Cases) -> Array:
    """FLOPs per token, forward and backward: 6 per parameter that it multiplies by."""
    per_width = np.where(c.glu > 0, 3.0, 2.0) * c.d_model
    sparse = np.where(c.n_experts > 0, c.n_layers - c.dense_layers, 0.0)
    ffn = (c.n_layers - sparse) * c.d_ff + sparse * (c.top_k * c.d_expert + c.d_shared)
    out: Array = 6.0 * (c.n_layers * c.attn_params + per_width * ffn + c.d_model * c.vocab)
    return out


def _attention_flops(c: Cases, runs: Sequence[Run]) -> Array:
    """12 L H Q T, or half of it."""
    halved = [bool(_HALVED.search(run.text["mfu_formula_notes"])) for run in runs]
    out: Array = np.where(halved, 6.0, 12.0) * c.n_layers * c.n_heads * c.head_dim * c.seq
    return out


def _claimed_rate(cases: Cases, runs: Sequence[Run]) -> Array:
    """FLOP/s of one GPU; NaN where nothing usable is claimed."""
    rates = np.full(len(runs), np.nan)
    for i, run in enumerate(runs):
        if run.oom or _HARDWARE.search(run.text["mfu_formula_notes"]):
            continue
        mfu = run.n("mfu") / (100.0 if run.n("mfu") > 1.0 else 1.0)
        # An MFU of 8 bits is over one of two peaks; which, only the row can say.
        peak = run.n("peak_tflops_dense_used") * 1e12
        if not peak > 0 and not cases.fp8[i]:
            peak = float(cases.peak_16[i])
        claims = [run.n("tflops_per_gpu") * 1e12, mfu * peak]
        rates[i] = next((rate for rate in claims if rate > 0), np.nan)
    return rates
