"""Is what a device computes right, in the right place, and without stopping the host?"""

from __future__ import annotations

import math
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_checks import Setting
from gpu_checks.bed import EXPERTS, bed
from trainsys.profiler.hang.dumps import load_content, parse_dump
from trainsys.resilience.flight import dump_flight_recorder
from trainsys.train.device import CudaTimer

FP32, BF16 = 2e-4, 3e-2
"""How far a loss of about 5 may be from the CPU's after 10 steps: rounding grows with them."""
PATHS: dict[str, tuple[tuple[str, ...], float]] = {
    "fp32": (("train.dtype=fp32",), FP32),
    "bf16": (("train.dtype=bf16",), BF16),
    "documents": (("train.dtype=fp32", "data.document_mask=true"), FP32),
    "documents, bf16": (("train.dtype=bf16", "data.document_mask=true"), BF16),
    "recompute full": (("train.dtype=fp32", "recompute.policy=full"), FP32),
    "recompute selective++": (("train.dtype=bf16", "recompute.policy=selective++"), BF16),
    "loss in chunks": (("train.dtype=fp32", "train.loss_chunk=16"), FP32),
    "experts, bf16": (("train.dtype=bf16", EXPERTS), BF16),
}
_CPU_PATH = {"recompute.policy=full", "recompute.policy=selective++", "train.loss_chunk=16"}
"""What the CPU's run leaves out: the answer does not depend on it."""


def losses(at: Setting, steps: int, *overrides: str) -> list[float]:
    """Losses of the demo's first steps; the weights are drawn on the CPU whatever the device, so they are the same."""
    run = bed(at, "train/demo", *overrides, batches=1 if at.tiny else 2)
    return [float(run.step().scalars[0]) for _ in range(steps)]


def compare(name: str, got: Sequence[float], wanted: Sequence[float], tolerance: float) -> float:
    """The largest distance of two loss curves, which must learn and lie within ``tolerance``."""
    assert all(map(math.isfinite, (*got, *wanted))), f"{name}: {got} for {wanted}"
    assert wanted[-1] < wanted[0] - 0.05, f"{name}: nothing is learnt on the CPU, {wanted}"
    gap = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert gap <= tolerance, f"{name}: {gap:.2e} from the CPU's losses, more than {tolerance:.0e}: {got} for {wanted}"
    return gap


def loss_parity(at: Setting) -> dict[str, Any]:
    """The loss curve of each path of the model is the CPU's."""
    steps = 3 if at.tiny else 10
    cpu = Setting(cuda=False, tiny=at.tiny)
    known: dict[tuple[str, ...], list[float]] = {}
    found = {}
    for name, (overrides, tolerance) in PATHS.items():
        plain = tuple(o for o in overrides if o not in _CPU_PATH)
        if plain not in known:
            known[plain] = losses(cpu, steps, *plain)
        found[name] = compare(name, losses(at, steps, *overrides), known[plain], tolerance)
    return {"steps": steps, "largest_distance": found}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for ``kind`` of device, by operation and the product's line that asked.

    Reads of a number, outputs whose size depends on numbers, and copies to or from another device that block.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "equal", "bincount")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        on = {t.device.type for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)}
        copies = name in ("_to_copy", "copy_") and len(on) > 1
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if self.kind in on and (name in self.WAITS or (copies and blocking)):
            self.places[f"{name} at {_product_line()}"] += 1
        return out


def _product_line() -> str:
    frames = [f for f in traceback.extract_stack() if "/trainsys/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def host_syncs(at: Setting) -> dict[str, Any]:
    """A step reads nothing back from the device; a judged one its loss and norm, once, in the engine."""
    found: dict[str, Any] = {}
    # On the CPU clipping reads its factor, which costs nothing there; a device is never asked.
    here = () if at.cuda else ("optim.clip_norm=0",)
    for name, overrides in {"plain": (), "documents": ("data.document_mask=true",), "experts": (EXPERTS,)}.items():
        run = bed(at, "train/demo", "train.dtype=bf16", *here, *overrides)
        run.step()
        for judged in (False, True):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if at.cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    with HostReads(at.kind) as reads:
                        run.step((lambda loss, norm: True) if judged else None)
                finally:
                    if at.cuda:
                        torch.cuda.set_sync_debug_mode("default")
            warned = sorted({_where(w) for w in said if "synchroniz" in str(w.message).lower()})
            key = f"{name}, judged" if judged else name
            found[key] = {"reads": dict(reads.places), "warned": warned}
            elsewhere = [place for place in reads.places if not (judged and " at native.py:" in place)]
            assert not elsewhere, f"{key}: the host waits for the device: {dict(reads.places)}"
            assert sum(reads.places.values()) == ((1 if at.cuda else 2) if judged else 0), (key, reads.places)
            assert len(warned) <= judged, f"{key}: the host waits for the device: {warned}"
    return found


def _where(warning: warnings.WarningMessage) -> str:
    return f"{Path(warning.filename).name}:{warning.lineno}"


def marks(at: Setting) -> dict[str, Any]:
    """A mark made while another stream is current is still one of the compute stream."""
    timer, side = CudaTimer(), torch.cuda.Stream()
    first = timer.mark()
    torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(side):
        inside = timer.mark()
        assert not timer.marks(None), "the side stream passes for the compute stream"
    torch.cuda.synchronize()
    seconds = timer.elapsed(first, inside)
    assert (seconds or 0.0) > 0.02, f"{seconds} s: the mark did not wait for the compute stream"
    return {"seconds": seconds}


def collectives(at: Setting) -> dict[str, Any]:
    """A group as a run makes it, of one rank: collectives work, and what the watchdog dumps has them."""
    library = "nccl" if at.cuda else "gloo"
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        library, store=dist.HashStore(), rank=0, world_size=1, device_id=at.device if at.cuda else None
    )
    x = torch.arange(4.0, device=at.device)
    dist.all_reduce(x)
    out = torch.empty(4, device=at.device)
    dist.all_gather_into_tensor(out, x)
    assert out.tolist() == [0.0, 1.0, 2.0, 3.0], out
    if at.cuda:
        time.sleep(1.0)  # the library's own thread notes what has ended, a few times a second
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank_00000.flight.pickle"
        state = dump_flight_recorder(path)
        dump = parse_dump(path, load_content(path), Counter())
    names = [operation.name for operation in dump.operations]
    dist.destroy_process_group()
    assert [n for n in names if "all_reduce" in n], f"the recorder of {library} has {names}"
    if at.cuda:
        assert state is not None, "the product cannot read the dump"
        assert not state.doing, f"nothing is under way, but the dump says {state}"
    return {"library": library, "recorded": names}
