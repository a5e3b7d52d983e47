"""ByteDance's op timelines (parquet): the what-if of Lin et al. 2025 over a job's operations, as a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainsys.errors import UserError
from trainsys.profiler.whatif import Timeline, read_rows

_COLUMNS = ("dp_rank", "stage", "step", "optype", "start_ts", "duration", "seq_id")


@dataclass(slots=True)
class TimelineReport:
    """``slowdown``: step time over what it had been with every operation ideal.

    ``worst``: (data rank, stage), slowest first.

    ``worst_gives_back``, ``last_stage_gives_back``: share of the loss gone with those workers' operations ideal.
    """

    path: str
    workers: int
    steps: int
    step_time_s: float
    slowdown: float
    worst: list[tuple[int, int]]
    worst_gives_back: float
    last_stage_gives_back: float
    by_kind: dict[str, float] = field(default_factory=dict)


def analyse_timeline(path: Path) -> TimelineReport:
    """Raises UserError where the file is no op timeline, or parquet cannot be read here."""
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'trainsys[parquet]'") from None
    try:
        table = parquet.read_table(path)
        missing = [c for c in _COLUMNS if c not in table.column_names]
        if missing:
            raise UserError(
                f"{path}: not an op timeline: no column {', '.join(missing)} (has {', '.join(table.column_names)})"
            )
        line = Timeline(read_rows(table.select(_COLUMNS).to_pylist()))
    except (ArrowException, OSError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: not an op timeline that can be replayed: {error}") from None
    if not line.steps:
        raise UserError(f"{path}: an op timeline without operations")
    worst = line.worst_workers()
    last = max(stage for _, stage in line.workers)
    return TimelineReport(
        str(path),
        len(line.workers),
        len(line.steps),
        line.actual_s,
        line.slowdown,
        worst,
        line.gives_back(lambda w: w in worst),
        line.gives_back(lambda w: w[1] == last),
        line.by_kind(),
    )
