"""Compute against the peak: what of it is useful work, and what a run's own steps say about the peak.

No step can compute faster than the hardware. A peak that was measured on a busy machine is too low; steps that beat it
measure a better one, which then holds for all that quotes the run's MFU. Event files keep what was known when they were
written.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainsys.profiler.steps import Floats, StepTable

FAST = 0.9
"""The peak is at least the rate that the fastest tenth of steps computed at: a single step's clock may be wrong."""


class Reached:
    """FLOP/s of one rank that a run has reached, over any number of windows.

    A whole step's FLOPs over its time always count, on average over the run. ``measured``: the peak is no vendor's; then
    forward and backward count too where the host's clock times them, as it does on a CPU. On a device other phases
    overlap with them, and a catalogue knows better.
    """

    def __init__(self, measured: bool) -> None:
        self._measured = measured
        self._flops = self._model = self._step_s = self._compute_s = 0.0
        self._rates: list[Floats] = []

    def add(self, table: StepTable, rows: npt.NDArray[np.int64], compute: Floats) -> None:
        """Steps ``rows`` of ``table``; ``compute``: seconds [T, R] of the model's own forward and backward."""
        world = table.layout.world
        model, hardware = table.flops_model[rows] / world, table.flops_hardware[rows] / world
        self._flops += float(np.maximum(model, hardware).sum())
        self._step_s += float(table.time[rows].mean(axis=1).sum())
        if self._measured and not table.on_device:
            seconds = compute[rows].mean(axis=1)
            self._model += float(model.sum())
            self._compute_s += float(seconds.sum())
            self._rates.append(np.divide(model, seconds, out=np.zeros_like(model), where=seconds > 0))

    def settle(self, peak: float) -> float:
        """``peak``, or what was reached where that is more."""
        found = [peak]
        if self._step_s > 0:
            found.append(self._flops / self._step_s)
        if self._compute_s > 0:
            found += [self._model / self._compute_s, float(np.quantile(np.concatenate(self._rates), FAST))]
        return max(found)


def compute_of(parts: dict[str, Floats]) -> Floats:
    """Seconds of the model's own forward and backward: without padding, repeated work and launch gaps."""
    return parts["compute"] + parts["other_compute"] if "other_compute" in parts else parts["compute"]


def at_peak(parts: dict[str, Floats], useful: Floats) -> dict[str, Floats]:
    """``parts`` with ``compute`` told apart into ``useful`` seconds at the peak, no more than there are, and the rest;
    [n] each."""
    out = dict(parts)
    useful = np.minimum(useful, compute_of(parts))
    out["useful"] = useful
    matmuls = out.pop("compute")
    if "other_compute" not in parts:
        return {**out, "compute_below_peak": matmuls - useful}
    # The work is matmuls, whatever the capture's share of them.
    grown = np.maximum(matmuls, useful)
    return {**out, "matmul_below_peak": grown - useful, "other_compute": parts["other_compute"] - (grown - matmuls)}


def make_room(parts: dict[str, Floats], between: dict[str, float], useful: float) -> float:
    """Moves seconds into ``compute`` where the work needs more at the peak than forward and backward took: phases of a
    host that runs ahead of its device, or of streams that overlap, are not where the device computed.

    Args:
        parts: term -> seconds [R]; changed.
        between: what of a term's mean is outside steps.
        useful: mean seconds that the work needs.

    Returns:
        Mean seconds that were moved.
    """
    short = useful - float(compute_of(parts).mean())
    others = [name for name in parts if name not in ("compute", "other_compute")]
    inside = {name: max(0.0, float(parts[name].mean()) - between.get(name, 0.0)) for name in others}
    room = sum(inside.values())
    if short <= 0 or room <= 0:
        return 0.0
    for name, seconds in inside.items():
        if seconds > 0:
            parts[name] = parts[name] * (1.0 - short / room * seconds / float(parts[name].mean()))
    parts["compute"] = parts["compute"] + short
    return short
