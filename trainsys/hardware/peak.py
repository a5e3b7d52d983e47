"""The denominator of MFU, which always says what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainsys.hardware.catalogue import Device, DType

if TYPE_CHECKING:
    from trainsys.hardware.measured import Measurement


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank. ``label`` goes wherever the MFU goes."""

    flops_per_s: float
    label: str
    source: Literal["catalogue", "measured"]


def peak_for_run(device: Device | None, dtype: DType, measured: Measurement | None = None) -> Peak | None:
    """The catalogue's dense peak; else a rank's share of what was measured here; else None, and no MFU."""
    per_device = device.peak(dtype) if device else None
    if device and per_device is not None:
        return Peak(per_device, f"{device.name} {dtype} dense {per_device / 1e12:g} TFLOP/s", "catalogue")
    if measured is not None:
        assert measured.key.dtype == dtype, (measured.key, dtype)
        return Peak(measured.flops_per_s / measured.key.processes, measured.label, "measured")
    return None
