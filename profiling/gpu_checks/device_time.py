"""The recorder's phases against the profiler's kernels of the same step."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_checks import Setting
from gpu_checks.bed import bed
from trainsys.telemetry.recorder import Recorder

MARK = "gpu_day:"
COMPUTE = ("forward", "backward", "optimizer")
LARGE = (
    "model.d_model=2048", "model.n_heads=16", "model.n_kv_heads=16", "model.d_ff=8192", "train.dtype=bf16",
    "train.global_batch=32", "train.micro_batch=32",
)  # fmt: skip
"""So large that a GPU is behind the host, though a profiler slows it, and its kernels follow one another."""
LEAST = 0.5
"""Share of a phase that its kernels fill at least, there."""


class Annotated(Recorder):
    """Says its phases to the profiler as well."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:  # type: ignore[override]
        with record_function(MARK + name), super().phase(name):
            yield


def against_profiler(at: Setting) -> dict[str, Any]:
    """Kernels that a phase launched take no longer than the phase has on the device, and fill most of it.

    On the CPU the host is the device: operators that nothing else called, against the host's phases.
    """
    run = bed(at, "train/demo", *(() if at.tiny else LARGE), recorder=Annotated)
    for _ in range(3):
        run.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if at.cuda else [])]
    with profile(activities=activities) as prof:
        result = run.engine.train_step(run.steps, run.batches[0])
        if at.cuda:
            torch.cuda.synchronize()
    step = run.recorder.end_step(run.steps)
    phases = step.phases
    if at.cuda:
        del result
        torch.cuda.synchronize()
        run.recorder.finish("done")
        assert run.recorder.last_device is not None, "the recorder has no device time of any step"
        assert run.recorder.last_device.step == run.steps, "the recorder lacks the step's device time"
        phases = run.recorder.last_device.phases
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    busy = busy_by_phase(events, on_device=at.cuda)
    filled = {name: busy.get(name, 0.0) / phases[name] for name in COMPUTE}
    for name, share in filled.items():
        assert share <= 1.02, f"{name}: its kernels take {share:.2f} of the time the recorder gives it"
        assert share >= (LEAST if at.cuda and not at.tiny else 0.05), f"{name}: the profiler sees {share:.2f} of its time"
    return {"phases_s": phases, "busy_s": busy, "filled": filled}


def busy_by_phase(events: list[dict[str, Any]], on_device: bool) -> dict[str, float]:
    """Seconds of kernels by the phase that launched them; on the CPU of outermost operators, over all threads."""
    spans = [e for e in events if e.get("ph") == "X"]
    starts = sorted((e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(MARK)) for e in spans
                    if e["name"].startswith(MARK) and e.get("cat") == "user_annotation")  # fmt: skip
    assert starts, "the profiler has none of the phases"

    def phase_at(ts: float) -> str:
        found = ""
        for _, ended, name in starts[: bisect_right(starts, (ts, float("inf"), ""))]:
            if ts < ended:
                found = name  # the innermost begins last
        return found

    busy: dict[str, float] = {}
    if on_device:
        launched = {
            e["args"]["correlation"]: e["ts"] for e in spans if e.get("cat") in ("cuda_runtime", "cuda_driver")
        }
        work = [(launched.get(e["args"]["correlation"]), e["dur"]) for e in spans if e.get("cat") == "kernel"]
        pairs = [(ts, dur) for ts, dur in work if ts is not None]
    else:
        pairs = list(_outermost([e for e in spans if e.get("cat") == "cpu_op"]))
    for ts, duration in pairs:
        name = phase_at(ts)
        busy[name] = busy.get(name, 0.0) + duration / 1e6
    return busy


def _outermost(ops: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    ends: dict[Any, float] = {}
    for e in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= ends.get(e["tid"], float("-inf")):
            ends[e["tid"]] = e["ts"] + e["dur"]
            yield e["ts"], e["dur"]
