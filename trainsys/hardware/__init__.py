"""What machines can do: the catalogue of accelerators, which of them this is, and what was measured here."""

from trainsys.hardware.catalogue import Device, DType, devices, lookup, match_device
from trainsys.hardware.measured import Measurement, MeasurementKey, load_measurement, store_measurement
from trainsys.hardware.peak import Peak, peak_for_run

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
