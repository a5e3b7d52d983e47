"""Accelerators by name, and which of them torch says this one is. Unknown is None, never the nearest."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from trainsys.errors import UserError
from trainsys.shipped_yaml import shipped_yaml

DType = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"]
_Positive = Annotated[float, Meta(gt=0, le=1e30)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
_Count = Annotated[int, Meta(gt=0)]

# What torch reports as memory varies by a percent or two with driver and ECC; the closest pair of parts that
# share a name is 96 against 144 GB, and the smallest cut by MIG or a partition is a half.
_MEMORY_TOLERANCE = 0.04


class _Row(Struct, frozen=True, forbid_unknown_fields=True):
    """Not a pydantic model as configs are: importing that was a quarter of the start of ``trainsys trace``."""


class Memory(_Row, frozen=True, kw_only=True):
    marketing_gb: _Positive
    """GB as sold."""
    usable_gib: _Positive
    """GiB that torch reports as total memory."""
    bandwidth_gb_s: _Positive


class ScaleUp(_Row, frozen=True, kw_only=True):
    """The fast domain: NVLink, xGMI or the like. Rates one way, GB/s."""

    link: str
    domain: _Count
    """Devices in it; 1: none."""
    gb_s: _NotNegative
    """Per device, to all others together."""
    p2p_gb_s: _NotNegative | None = None
    """Between two devices."""


class Device(_Row, frozen=True, kw_only=True):
    """One accelerator as one process sees it. Field meanings and units: the head of ``catalogue.yaml``."""

    name: str
    vendor: str
    arch: str
    peak_tflops: dict[DType, _Positive]
    achieved_tflops: dict[DType, _Positive] = field(default_factory=dict)
    """Measured by others."""
    memory: Memory
    scale_up: ScaleUp
    network_gb_s: _NotNegative
    sms: _Count | None = None
    power_w: _Positive | None = None
    """Board power limit, watts."""
    per_node: _Count
    torch_names: list[str] = field(default_factory=list)
    """Device names, whole; none: not run by torch."""
    name_needs_memory: bool = False
    """The name alone does not tell the part."""
    trap: str
    source: str
    verified: Literal["vendor_text", "second_source", "unchecked"]

    def peak(self, dtype: DType) -> float | None:
        """Dense vendor peak, FLOP/s (int8: OP/s); None: the device has none. ``fp32`` is not ``tf32``."""
        tflops = self.peak_tflops.get(dtype)
        return None if tflops is None else tflops * 1e12

    def achieved(self, dtype: DType) -> float | None:
        """Best matmul rate that others measured, FLOP/s; None where nobody's figure is known."""
        tflops = self.achieved_tflops.get(dtype)
        return None if tflops is None else tflops * 1e12


@cache
def devices() -> dict[str, Device]:
    """Every device of the catalogue by name, in its order."""
    rows = msgspec.convert(shipped_yaml("trainsys.hardware", "catalogue.yaml"), list[Device])
    return {device.name: device for device in rows}


def lookup(name: str) -> Device:
    """The device of that catalogue name, in any case.

    Raises:
        UserError: there is none; says what is close. ``H100`` alone is refused: its peak depends on the form.
    """
    by_lower = {known.lower(): device for known, device in devices().items()}
    key = name.lower()
    if key in by_lower:
        return by_lower[key]
    close = [d.name for low, d in by_lower.items() if key and low.startswith(key)]
    if close:
        raise UserError(f"hardware {name!r} could be any of {', '.join(close)}: name one")
    import difflib

    close = [by_lower[low].name for low in difflib.get_close_matches(key, by_lower, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(devices())}"
    raise UserError(f"hardware {name!r} is not in the catalogue; {hint}")


def match_device(
    torch_name: str, memory_gib: float | None = None, sm_count: int | None = None
) -> Device | None:
    """The catalogue's device for what torch reports, or None.

    Args:
        torch_name: ``torch.cuda.get_device_name()``. It must be a known name whole, so that a MIG slice, a
            vGPU or a new form factor is not taken for the part whose name it begins with.
        memory_gib: ``total_memory / 2**30``. A name that does not tell the part is only matched with it.
        sm_count: ``multi_processor_count``. Where given, memory and this must fit: a partitioned MI300X keeps
            the whole part's name.
    """
    wanted = " ".join(torch_name.split()).lower()
    for device in devices().values():
        if wanted not in (known.lower() for known in device.torch_names):
            continue
        if memory_gib is None:
            fits = not device.name_needs_memory
        else:
            usable = device.memory.usable_gib
            fits = abs(memory_gib - usable) <= _MEMORY_TOLERANCE * usable
        if fits and (sm_count is None or device.sms is None or sm_count == device.sms):
            return device
    return None
