"""What machine this is, what the catalogue says of it, and what the tests of its kind say."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_checks import Setting
from trainsys.hardware import match_device, peak_for_run

ROOT = Path(__file__).resolve().parents[2]


def environment(at: Setting) -> dict[str, Any]:
    """Versions, and the device as torch reports it."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if at.cuda:
        p = torch.cuda.get_device_properties(at.device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
            "device": p.name,
            "memory_gib": p.total_memory / 2**30,
            "multiprocessors": p.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(at.device)),
            "smi": smi("driver_version", "clocks.max.sm", "power.limit"),
        }
    product = torch.ones(64, 64, device=at.device) @ torch.ones(64, 64, device=at.device)
    assert product.sum().item() == 64**3, "the device does not multiply ones"
    return found


def smi(*fields: str) -> dict[str, str] | None:
    """What nvidia-smi says of the first device; None where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return dict(zip(fields, (v.strip() for v in done.stdout.split(",")), strict=False))


def catalogue(at: Setting) -> dict[str, Any]:
    """The catalogue knows this part by what torch reports of it, and so its peak."""
    p = torch.cuda.get_device_properties(at.device)
    reported = p.name, p.total_memory / 2**30, p.multi_processor_count
    device = match_device(*reported)
    assert device is not None, f"the catalogue does not know {reported}"
    peak = peak_for_run(device, "bf16")
    assert peak is not None, f"{device.name} has no bf16 peak"
    return {"device": device.name, "bf16_tflops": peak.flops_per_s / 1e12}


def gpu_tests(at: Setting) -> dict[str, Any]:
    """Every test that is marked ``gpu``."""
    # These files alone: to collect all others takes longer than to run these.
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
    assert "passed" in said, f"none ran: {said}"
    return {"said": said}
