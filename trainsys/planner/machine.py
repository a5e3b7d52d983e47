"""What the planner needs of a machine, in bytes/s and FLOP/s, from the catalogue and a cluster's own network."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from trainsys.errors import UserError
from trainsys.hardware import Device, devices, lookup
from trainsys.planner.cases import ARCHS

# Best matmul over dense peak where nobody's measurement is catalogued: the mean of that architecture's others.
_MATMUL_OF_PEAK = {
    "volta": 0.80,
    "ampere": 0.87,
    "hopper": 0.80,
    "blackwell": 0.75,
    "cdna": 0.56,
    "other": 0.80,
}
_FP8_MATMUL_OF_PEAK = {"hopper": 0.71, "blackwell": 0.74, "cdna": 0.50, "other": 0.70}
_FALLBACK_SMS = 128.0
GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """One device of a cluster. Rates in FLOP/s or bytes/s one way; ``nic_bw`` leaves one whole domain; ``watts`` of the
    board for each dense 16-bit TFLOP/s of the catalogue, infinite where that is not known."""

    name: str
    arch: int
    peak_16: float
    gemm_16: float
    gemm_8: float | None
    gemm_4: float | None
    sms: float
    hbm_bw: float
    mem_bytes: float
    link_bw: float
    pair_bw: float
    domain: float
    nic_bw: float
    watts: float

    def at(self, kind: str) -> float:
        """FLOP/s of the best large matmul at ``bf16``, ``fp8`` or ``fp4``.

        Raises:
            UserError: the device has no units for it.
        """
        rate = {"bf16": self.gemm_16, "fp16": self.gemm_16, "fp8": self.gemm_8, "fp4": self.gemm_4}.get(kind)
        if rate is None:
            raise UserError(f"{self.name} has no {kind} matmul; bf16 or fp16 would work")
        return rate


def arch_of(device: Device) -> str:
    low = device.arch.lower()
    return next((a for a in ARCHS if low.startswith(a)), "other")


def from_device(device: Device, *, nodes_domain: int | None = None, nic_gb_s: float | None = None) -> Machine:
    """``nodes_domain``: devices of one scale-up domain where it is not the part's own; ``nic_gb_s``: network of one
    device, one way."""
    arch = arch_of(device)
    peak = device.peak("bf16") or device.peak("fp16")
    if peak is None:
        raise UserError(f"{device.name} has no 16-bit peak in the catalogue: it cannot be planned for")
    gemm = device.achieved("bf16") or device.achieved("fp16") or peak * _MATMUL_OF_PEAK[arch]
    peak8 = device.peak("fp8")
    gemm8 = (
        None
        if peak8 is None
        else (device.achieved("fp8") or peak8 * _FP8_MATMUL_OF_PEAK.get(arch, 0.7))
    )
    peak4 = device.peak("fp4")
    domain = float(nodes_domain or device.scale_up.domain)
    nic = (nic_gb_s if nic_gb_s is not None else device.network_gb_s) * 1e9
    link = max(device.scale_up.gb_s, 8.0) * 1e9
    pair = (device.scale_up.p2p_gb_s or device.scale_up.gb_s or 8.0) * 1e9
    return Machine(
        device.name,
        ARCHS.index(arch),
        peak,
        gemm,
        gemm8,
        peak4 and min(peak4, 2.0 * (peak8 or peak4)),
        float(device.sms or _FALLBACK_SMS),
        device.memory.bandwidth_gb_s * 1e9,
        device.memory.usable_gib * GIB,
        link,
        pair,
        domain,
        nic * domain,
        device.power_w / (peak / 1e12) if device.power_w else math.inf,
    )


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"(\d+)\s*gi?b\b", r"\1", text.lower()))


_NOISE = {"nvidia", "amd", "tesla", "instinct", "gpu", "hbm2", "hbm2e", "hbm3", "hbm3e", "oam"}


@lru_cache(maxsize=512)
def device_named(text: str) -> Device:
    """The catalogue's device for a free-text GPU name: exact, else the one whose name shares all its tokens;
    the commonest form (SXM, largest memory) where several do.

    Raises:
        UserError: none fits.
    """
    try:
        return lookup(text)
    except UserError as error:
        wanted = {re.sub(r"^sxm\d$", "sxm", t) for t in _tokens(text)} - _NOISE
        hits = [d for d in devices().values() if wanted and wanted <= set(_tokens(d.name))]
        if not hits:
            raise error
        hits.sort(key=lambda d: ("SXM" not in d.name, len(_tokens(d.name)), -d.memory.usable_gib))
        return hits[0]


_FABRIC = re.compile(
    r"\bib\b|infiniband|omnipath|opa|roce|rdma|efa|ethernet|slingshot|\bcx\d|connectx|\bndr\b|\bhdr\b|\bedr\b|nic|gpudirect",
    re.I,
)
_GENERATION = {
    "hdr": 200.0,
    "ndr": 400.0,
    "edr": 100.0,
    "xdr": 800.0,
    "cx7": 400.0,
    "cx8": 800.0,
    "efa": 400.0,
}


def network_from_text(text: str, per_node: int) -> float | None:
    """GB/s one way for one device out of a description such as ``NVLink3; 4x OmniPath 100Gb/s per node``.

    Rates are read as Gbit/s, as fabrics are sold. A rate ``per node``, or a count of NICs below the number of
    devices, is shared among them. None where the text does not say.
    """
    for clause in re.split(r"[;,+]|\band\b", text):
        if not _FABRIC.search(clause) or "nvlink" in clause.lower():
            continue
        rate = re.search(r"(\d+(?:\.\d+)?)\s*(?:gbps|gb/s|gbit/s|gbit|gb|g)\b", clause, re.I)
        count = re.search(r"(\d+)\s*x\s*", clause, re.I)
        low = clause.lower()
        gbit = float(rate.group(1)) if rate else next((v for n, v in _GENERATION.items() if n in low), 0.0)
        if not gbit:
            continue
        if count:
            return gbit / 8.0 * int(count.group(1)) / per_node
        return gbit / 8.0 / (per_node if re.search(r"per node|/node|node-node|inter-?node", low) else 1.0)
    return None


def with_memory(machine: Machine, gib: float) -> Machine:
    return replace(machine, mem_bytes=gib * GIB)
