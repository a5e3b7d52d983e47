"""What machines can do: the catalogue of accelerators, which of them this is, and what was measured here."""

from typing import TYPE_CHECKING, Any

from trainsys.hardware.catalogue import Device, DType, devices, lookup, match_device
from trainsys.hardware.peak import Peak, peak_for_run

if TYPE_CHECKING:
    from trainsys.hardware.measured import Measurement, MeasurementKey, load_measurement, store_measurement

__all__ = [
    "DType",
    "Device",
    "Measurement",
    "MeasurementKey",
    "Peak",
    "devices",
    "load_measurement",
    "lookup",
    "match_device",
    "peak_for_run",
    "store_measurement",
]


def __getattr__(name: str) -> Any:
    """What was measured here comes with pydantic, which those who only look a device up do not wait for."""
    if name in __all__:
        from trainsys.hardware import measured

        return getattr(measured, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
