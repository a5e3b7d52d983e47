"""The catalogue, and which device a name from torch is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainsys.errors import UserError
from trainsys.flops import mfu
from trainsys.hardware import Device, devices, lookup, match_device

MATCHES = [
    ("NVIDIA H100 80GB HBM3", 79.1, 132, "H100-SXM-80"),
    ("NVIDIA H100 80GB HBM3", 79.6, None, "H100-SXM-80"),
    ("NVIDIA H100 PCIe", 79.2, 114, "H100-PCIe-80"),
    ("NVIDIA H100 NVL", 93.1, 132, "H100-NVL-94"),
    ("NVIDIA H100", 94.0, None, "H100-SXM-96-HBM2e"),
    ("NVIDIA H200", 139.8, 132, "H200-SXM"),
    ("NVIDIA H200 NVL", 139.8, 132, "H200-NVL"),
    ("NVIDIA H20", 95.1, 78, "H20"),
    ("NVIDIA A100-SXM4-80GB", 79.25, 108, "A100-SXM-80"),
    ("NVIDIA A100-SXM4-40GB", 39.5, 108, "A100-SXM-40"),
    ("NVIDIA A100-PCIE-40GB", 39.4, 108, "A100-PCIe-40"),
    ("NVIDIA A100 80GB PCIe", 79.2, 108, "A100-PCIe-80"),
    ("NVIDIA GH200 480GB", 94.5, 132, "GH200-96"),
    ("NVIDIA B200", 178.4, 148, "B200-SXM"),
    ("NVIDIA GB200", 184.0, None, "GB200-NVL72"),
    ("NVIDIA GB200", 185.03, 152, "GB200-NVL72"),
    ("NVIDIA GB300", 277.5, 152, "GB300-NVL72"),
    ("NVIDIA B300 SXM6 AC", 268.6, 148, "B300-SXM"),
    ("Tesla V100-SXM2-32GB", 31.7, 80, "V100-SXM2-32"),
    ("AMD Instinct MI300X", 191.98, 304, "MI300X"),
    ("AMD Instinct MI250X", 63.98, 110, "MI250X-GCD"),
    ("nvidia  h100 pcie", None, None, "H100-PCIe-80"),
]
UNKNOWN = [
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8, 16),
    ("NVIDIA H100 80GB HBM3", 9.8, 16),  # a slice that kept the name
    ("NVIDIA H100 80GB HBM3", 79.1, 114),
    ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.2, 42),
    ("NVIDIA H100", None, None),
    ("NVIDIA H100", 79.1, 132),
    ("GRID A100X-40C", 39.0, 108),
    ("NVIDIA A100X", 79.2, 108),
    ("NVIDIA A10G", 22.0, 80),
    ("NVIDIA H100L-94C", 93.0, 132),
    ("NVIDIA H20-3e", 139.8, 78),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.0, 188),
    ("NVIDIA B100", 180.0, 148),
    ("AMD Instinct MI300X", 24.0, 38),  # partitioned
    ("AMD Instinct MI300A", 128.0, 228),
    ("H100", 79.1, 132),
    ("", None, None),
    ("cpu", None, None),
]


@pytest.mark.parametrize(("name", "memory_gib", "sms", "expected"), MATCHES)
def test_match(name: str, memory_gib: float | None, sms: int | None, expected: str) -> None:
    found = match_device(name, memory_gib, sms)
    assert found is not None
    assert found.name == expected


@pytest.mark.parametrize(("name", "memory_gib", "sms"), UNKNOWN)
def test_unknown_is_none_and_never_a_guess(name: str, memory_gib: float | None, sms: int | None) -> None:
    assert match_device(name, memory_gib, sms) is None


def test_a_pcie_card_is_not_given_the_peak_of_an_sxm() -> None:
    pcie, sxm = match_device("NVIDIA H100 PCIe"), match_device("NVIDIA H100 80GB HBM3")
    assert pcie is not None
    assert sxm is not None
    assert (pcie.peak("bf16"), sxm.peak("bf16")) == (756e12, 989.4e12)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("A100-SXM-80", "bf16", 312),  # 624 with sparsity
        ("A100-SXM-80", "tf32", 156),
        ("A100-SXM-80", "fp32", 19.5),
        ("A100-SXM-80", "fp8", None),  # 624 in some tables: that is int8
        ("H100-SXM-80", "bf16", 989.4),
        ("H100-SXM-80", "fp8", 1978.9),
        ("H100-SXM-80", "tf32", 494.7),
        ("H100-SXM-80", "fp32", 66.9),
        ("V100-SXM2-16", "bf16", None),
        ("B200-SXM", "bf16", 2250),
        ("GB200-NVL72", "bf16", 2500),
        ("MI300X", "bf16", 1307.4),
        ("MI250X-GCD", "bf16", 191.5),  # half a module
        ("RTX-4090", "bf16", 165.2),
        ("TPU-v5p", "bf16", 459),
    ],
)
def test_dense_peaks(name: str, dtype: str, tflops: float | None) -> None:
    peak = lookup(name).peak(dtype)  # type: ignore[arg-type]
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


# Dense multiply-adds a clock and SM (or CU) by architecture, twice, and the boost clock of the datasheet.
CLOCKS = {
    "V100-SXM2-16": ("fp16", 1024, 1.53e9),
    "A100-SXM-80": ("bf16", 2048, 1.41e9),
    "H100-SXM-80": ("bf16", 4096, 1.83e9),
    "H100-PCIe-80": ("bf16", 4096, 1.62e9),
    "MI300X": ("bf16", 2048, 2.1e9),
    "MI325X": ("bf16", 2048, 2.1e9),
    "MI350X": ("bf16", 4096, 2.2e9),
    "MI355X": ("bf16", 4096, 2.4e9),
    "L40S": ("bf16", 1024, 2.52e9),
    "RTX-4090": ("bf16", 512, 2.52e9),
    "RTX-3090": ("bf16", 512, 1.695e9),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_peak_is_units_times_clock(name: str) -> None:
    dtype, per_clock, hertz = CLOCKS[name]
    device = lookup(name)
    assert device.sms is not None
    assert device.peak(dtype) == pytest.approx(device.sms * per_clock * hertz, rel=0.015)  # type: ignore[arg-type]


def test_llama3_405b_divides_by_the_same_peak() -> None:
    # Dubey et al. 2024, table 4: 430 TFLOP/s a GPU is given as 43% MFU.
    assert mfu(430e12, 1.0, lookup("H100-SXM-80").peak("bf16")) == pytest.approx(0.43, abs=0.005)


@pytest.mark.parametrize("device", devices().values(), ids=lambda d: d.name)
def test_rows_are_sound(device: Device) -> None:
    peaks = device.peak_tflops
    assert peaks
    assert device.memory.usable_gib * 2**30 <= device.memory.marketing_gb * 1e9 * 1.075  # GB or GiB as sold
    assert peaks.get("fp32", 0) <= peaks.get("tf32", 1e9)
    if "tf32" in peaks and "bf16" in peaks:
        assert peaks["bf16"] < 4 * peaks["tf32"]  # twice is for half the bits; twice again would be sparse
    if "bf16" in peaks and "fp8" in peaks:
        assert peaks["bf16"] <= peaks["fp8"] < 4 * peaks["bf16"]
    for dtype, measured in device.achieved_tflops.items():
        assert measured < peaks[dtype]
    assert device.scale_up.p2p_gb_s is None or device.scale_up.p2p_gb_s <= device.scale_up.gb_s
    assert device.source


def test_no_name_is_claimed_twice() -> None:
    names = [n.lower() for d in devices().values() for n in d.torch_names]
    assert len(names) == len(set(names))


def test_lookup_refuses_with_a_hint() -> None:
    assert lookup("h100-sxm-80") is lookup("H100-SXM-80")
    with pytest.raises(UserError, match=r"did you mean H100-SXM-80"):
        lookup("H100-SMX-80")
    with pytest.raises(UserError, match=r"any of H100-SXM-80.*H100-PCIe-80"):
        lookup("H100")
    with pytest.raises(UserError, match=r"known: V100"):
        lookup("")


def test_no_torch_is_imported() -> None:
    code = "import sys, trainsys.hardware, trainsys.flops; trainsys.hardware.devices(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
