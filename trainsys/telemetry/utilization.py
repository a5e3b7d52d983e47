"""The utilizations that a run quotes: one value each, for the report, summary.json, sinks, ``jobs ls`` and sweeps."""

from __future__ import annotations

from dataclasses import dataclass

from trainsys.telemetry.run_data import RunData
from trainsys.telemetry.text import rate

NAMES = ("mfu", "mfu_palm", "hfu")


@dataclass(frozen=True)
class Utilization:
    """0..1, None where unknown: FLOPs of the steps after warm-up over what ``peak_flops`` allows in their time, mean over
    ranks, stalls between steps left out. ``peak_flops``: FLOP/s of one rank."""

    mfu: float | None = None
    mfu_palm: float | None = None
    hfu: float | None = None
    peak_flops: float | None = None
    peak_label: str = ""
    peak_note: str = ""
    """Where the run was faster than the peak that it started with: what was done about it, in words."""

    @property
    def shares(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in NAMES}


def utilization(run: RunData, mfu: float | None, peak_flops: float | None) -> Utilization:
    """``mfu`` of ``peak_flops`` are the waterfall's; the other counts are in proportion to their FLOPs."""
    start, flops = run.start, run.lead.work.flops
    label, note = start.peak_label, ""
    if start.peak_flops and peak_flops and peak_flops > start.peak_flops:
        label = f"{rate(peak_flops)} a rank, reached in this run"
        note = (
            f"a rank, as the steps reached it: they were faster than the {rate(start.peak_flops)} taken at the start"
            f" ({start.peak_label or 'without a name'})"
        )
        if start.peak_source == "catalogue":
            note += "; no device beats its catalogue peak, so check hardware: and train.dtype"
    if mfu is None or not flops.model:
        return Utilization(mfu, peak_flops=peak_flops or start.peak_flops, peak_label=label, peak_note=note)
    palm, hardware = (None if n is None else mfu * n / flops.model for n in (flops.palm, flops.hardware))
    return Utilization(mfu, palm, hardware, peak_flops, label, note)
