"""Read tables of published runs as they come: missing columns, empty cells, odd spellings, unknown hardware.

The columns are those of a published-runs table (see docs/planner.md). A row becomes a ``Run`` of typed values, or a
``Refusal`` with the reason.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainsys.errors import UserError

NUMBERS = (
    "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab", "seq_len", "moe_n_experts",
    "moe_top_k", "moe_d_ff", "moe_shared_d_ff", "moe_dense_layers", "n_params", "n_gpus", "gpus_per_node", "dp",
    "zero_stage", "tp", "pp", "vpp", "cp", "ep", "micro_batch", "global_batch", "step_time_s",
    "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "peak_mem_gb", "peak_tflops_dense_used",
    "flops_per_token_causal", "flops_per_token_noncausal", "mfu_recomputed_causal",
)  # fmt: skip
TEXTS = (
    "row_id", "source", "model_name", "ffn_kind", "gpu", "interconnect", "dtype", "schedule", "recompute",
    "attention_kernel", "flags", "status", "quality", "mfu_formula_notes",
)  # fmt: skip
FLAGS = ("tied_emb", "fsdp", "sp", "oom")
_TRUE = {"1", "1.0", "true", "yes", "y", "t"}
_EMPTY = {"", "nan", "none", "null", "na", "n/a", "-", "?"}


@dataclass(frozen=True)
class Run:
    """One row: numbers (NaN where empty), texts ('' where empty) and flags (None where empty)."""

    num: Mapping[str, float]
    text: Mapping[str, str]
    flag: Mapping[str, bool | None]

    def n(self, name: str, default: float = math.nan) -> float:
        value = self.num[name]
        return default if math.isnan(value) else value

    @property
    def source(self) -> str:
        return self.text["source"] or "unknown"

    @property
    def oom(self) -> bool:
        return bool(self.flag["oom"]) or "oom" in self.text["status"].lower()

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate: three matrices instead of two."""
        return self.text["ffn_kind"].lower() in ("swiglu", "geglu", "glu", "reglu")

    @property
    def step_s(self) -> float:
        """Measured seconds of a step, from throughput where time is not given; NaN where neither is."""
        if self.oom:
            return math.nan
        if self.n("step_time_s") > 0:
            return self.n("step_time_s")
        tokens = self.n("global_batch") * self.n("seq_len")
        rate = self.n("tokens_per_s_per_gpu") * self.n("n_gpus")
        if tokens > 0 and rate > 0:
            return tokens / rate
        flops = self.n("flops_per_token_causal")
        peak = self.n("peak_tflops_dense_used") * 1e12
        mfu = self.n("mfu_recomputed_causal")
        if tokens > 0 and flops > 0 and peak > 0 and mfu > 0:
            return tokens * flops / (mfu * peak * self.n("n_gpus"))
        return math.nan


@dataclass(frozen=True)
class Refusal:
    run: Run
    reason: str
    layout_known: bool = field(default=True)


def _number(cell: str) -> float:
    cell = cell.strip().replace(",", "").replace("_", "")
    if cell.lower() in _EMPTY:
        return math.nan
    if cell.lower() in ("true", "false"):
        return float(cell.lower() == "true")
    try:
        value = float(cell.rstrip("%"))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _flag(cell: str) -> bool | None:
    cell = cell.strip().lower()
    return None if cell in _EMPTY else cell in _TRUE


def parse(rows: Iterable[Mapping[str, str | None]]) -> list[Run]:
    runs = []
    for row in rows:
        cell = {k: (v or "") for k, v in row.items() if isinstance(k, str) and not isinstance(v, list)}
        runs.append(
            Run(
                {n: _number(cell.get(n, "")) for n in NUMBERS},
                {t: cell.get(t, "").strip() for t in TEXTS},
                {f: _flag(cell.get(f, "")) for f in FLAGS},
            )
        )
    return runs


def read(path: str | Path) -> list[Run]:
    """Every row of the table.

    Raises:
        UserError: no such file, not a CSV, or a table without the columns that name a model and a machine.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            names = set(reader.fieldnames or ())
            missing = {"n_layers", "d_model", "gpu", "n_gpus"} - names
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(sorted(missing))}; columns are listed in docs/planner.md"
                )
            return parse(reader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table: {error}") from error
