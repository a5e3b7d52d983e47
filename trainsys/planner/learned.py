"""What the planner has learned on one machine: constants fitted to runs there, and rates measured there.

A file of it is written by ``trainsys sweep --calibration FILE`` and read by ``trainsys plan --calibration FILE``,
which takes the JSON of ``trainsys bench`` as well. Few runs move few constants: those that the runs of one machine
tell apart, each held to its shipped value as firmly as its prior says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from trainsys.errors import UserError
from trainsys.planner.calibrate import fit
from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import PRIORS, Constants, shipped
from trainsys.planner.machine import Machine
from trainsys.planner.step_time import step_time

MOVED = (
    "gemm_eff", "hbm_eff", "layer_host_s", "layer_host_modern_s", "step_s", "link_eff", "nic_eff",
    "collective_host_s", "hop_intra_s", "hop_inter_s", "tp_exposed", "cp_exposed", "fsdp_contention", "dp_window",
    "pp_exposed", "opt_bytes",
)  # fmt: skip
"""Constants that differ between machines and their software; what a model costs stays as it is."""
RATES = ("peak_16", "gemm_16", "gemm_8", "hbm_bw", "link_bw", "nic_bw")


@dataclass(frozen=True)
class Learned:
    """``scale`` multiplies what ``constants`` predict: all that a single run can teach."""

    constants: Constants
    rates: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    runs: int = 0
    error_pct: float | None = None
    """median absolute error of each run predicted from the others"""
    before_pct: float | None = None
    """the same of the shipped constants"""

    def machine(self, of: Machine) -> Machine:
        """``of`` at the measured rates."""
        return Machine(**{**asdict(of), **self.rates})

    @property
    def confidence(self) -> str:
        if not self.runs:
            return (
                f"rates measured here ({', '.join(sorted(self.rates))}); constants fitted to published runs"
            )
        if self.error_pct is None:
            return "anchored on one run measured here: ranks as before, times scaled to it"
        return (
            f"fitted to {self.runs} runs measured here: each predicted from the others to {self.error_pct:.1f}% "
            f"(median; the shipped constants were {self.before_pct:.1f}% off)"
        )


def learn(cases: Cases, seconds: Array, rates: dict[str, float] | None = None) -> Learned:
    """From ``cases`` measured at ``seconds`` a step on one machine."""
    assert len(seconds) >= 1
    base = shipped()
    before = _errors(cases, seconds, base, 1.0)
    if len(seconds) < 3:
        return Learned(
            base, rates or {}, _scale(cases, seconds, base), len(seconds), None, float(np.median(before))
        )
    left_out = []
    for i in range(len(seconds)):
        keep = np.arange(len(seconds)) != i
        k, scale = _fit(cases.take(keep), seconds[keep])
        left_out.append(_errors(cases.take(~keep), seconds[~keep], k, scale)[0])
    k, scale = _fit(cases, seconds)
    return Learned(k, rates or {}, scale, len(seconds), float(np.median(left_out)), float(np.median(before)))


def _fit(cases: Cases, seconds: Array) -> tuple[Constants, float]:
    """A common factor first: the rest tells layouts apart."""
    scale = _scale(cases, seconds, shipped())
    k = fit(cases, seconds / scale, np.ones(len(seconds)), start=shipped(), only=MOVED)
    return k, scale * _scale(cases, seconds / scale, k)


def _scale(cases: Cases, seconds: Array, k: Constants) -> float:
    predicted = np.broadcast_to(step_time(cases, k).total, seconds.shape)
    return float(np.exp(np.median(np.log(seconds / predicted))))


def _errors(cases: Cases, seconds: Array, k: Constants, scale: float) -> Array:
    predicted = scale * np.broadcast_to(step_time(cases, k).total, seconds.shape)
    out: Array = 100.0 * np.abs(predicted / seconds - 1.0)
    return out


def save(path: str | Path, learned: Learned) -> None:
    """Raises UserError where it cannot be written."""
    content = {"trainsys_calibration": 1, **asdict(learned)}
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--calibration {path}: {error.strerror or error}") from error


def load(path: str | Path) -> Learned:
    """Either file. Raises UserError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--calibration {path}: {error.strerror or error}") from error
    except ValueError:
        raise UserError(f"--calibration {path}: not JSON") from None
    if isinstance(content, dict) and content.get("trainsys_calibration") == 1:
        names = {f.name for f in fields(Learned)}
        rest = {n: v for n, v in content.items() if n in names}
        if set(rest.get("constants", ())) != set(PRIORS):
            raise UserError(
                f"--calibration {path}: its constants are not this version's; "
                "`trainsys sweep --calibration` writes it anew"
            )
        return Learned(**{**rest, "constants": Constants(**rest["constants"])})
    rates = bench_rates(content)
    if not rates:
        raise UserError(
            f"--calibration {path}: neither what trainsys sweep --calibration writes nor the JSON of trainsys bench"
        )
    return Learned(shipped(), rates)


def bench_rates(content: Any) -> dict[str, float]:
    """The rates of one device that a bench's JSON holds, by the field of `Machine`; what it measured for all its
    processes together is divided among them."""
    rates: dict[str, float] = {}
    rows: Sequence[Any] = content if isinstance(content, list) else [content]
    for row in rows:
        if not isinstance(row, dict):
            continue
        key = row.get("key", row)
        processes = max(1, int(key.get("processes", 1)))
        dtype, flops = key.get("dtype"), row.get("flops_per_s")
        if isinstance(flops, (int, float)) and dtype in ("bf16", "fp16", "fp32"):
            best = max(rates.get("gemm_16", 0.0), flops / processes)
            rates |= {"gemm_16": best, "peak_16": best}
        moved = row.get("bytes_per_s")
        if isinstance(moved, (int, float)):
            rates["hbm_bw"] = max(rates.get("hbm_bw", 0.0), moved / processes)
    return rates
