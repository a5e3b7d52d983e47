"""What telemetry costs a step: all of it on, all of it off, alternating in blocks of one run.

    python profiling/telemetry_overhead.py --blocks 40 --out profiling/results/telemetry_overhead.json

A step is 50 ms of real matrix products, cut into phases and collectives as a model's would be. "On" is recorder,
event file, spans of every collective, memory, the window's gather, the live watch, and JSON lines; "off" is the same
step with a recorder that records nothing. Median steps of the two are compared; blocks alternate so that what else
the machine does hits both. CPU time of the step's thread is compared too, which other processes do not move.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from trainsys.layout import Layout  # noqa: E402
from trainsys.profiler.live import LiveWatch  # noqa: E402
from trainsys.telemetry.events import Flops, Step  # noqa: E402
from trainsys.telemetry.metrics import step_metrics  # noqa: E402
from trainsys.telemetry.recorder import Recorder, here  # noqa: E402
from trainsys.telemetry.sinks.base import RunInfo, Sinks  # noqa: E402
from trainsys.telemetry.sinks.jsonl import JsonlSink  # noqa: E402
from trainsys.train.gather import WindowGather  # noqa: E402

BLOCK, COLLECTIVES = 10, 60


class Nothing:
    """A recorder that is off."""

    _span: AbstractContextManager[None] = nullcontext()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._span

    def collective_span(self, axis: str, op: str, nbytes: int) -> AbstractContextManager[None]:
        return self._span


def step(recorder: Any, a: torch.Tensor, out: torch.Tensor, times: int) -> None:
    spans = COLLECTIVES // 4
    with recorder.phase("data"):
        pass
    for phase, share in (("forward", 1), ("backward", 2), ("optimizer", 1)):
        with recorder.phase(phase):
            for i in range(times * share // 4):
                torch.mm(a, a, out=out)
                if i < spans * share:
                    with recorder.collective_span("tp", "all_reduce", 4096):
                        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help="of ten steps each, half of them on")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    a, out = torch.randn(96, 96), torch.empty(96, 96)
    t0 = time.thread_time()
    for _ in range(2000):
        torch.mm(a, a, out=out)
    times = max(4 * COLLECTIVES, round(2000 * 0.05 / (time.thread_time() - t0)))
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder, here(run_id="overhead", rank=0, world=1, peak_flops=1e11))
        sinks = Sinks([JsonlSink()], print)
        sinks.start(RunInfo("overhead", "overhead", Path(folder), 1))
        gather = WindowGather(1, 1)
        watch = LiveWatch(Layout(), 1e11, print, sinks.extra)
        wall: dict[bool, list[float]] = {True: [], False: []}
        cpu: dict[bool, list[float]] = {True: [], False: []}
        reading = ThreadPoolExecutor(1)

        def show(window: torch.Tensor, record: Step) -> None:
            steps, together = gather.read(window)
            sinks.step(record.step, step_metrics(record, together, tokens_seen=1))
            watch.add(steps, flops)

        flops = Flops(model=1e9, palm=1e9, hardware=1e9)
        recorder.begin()
        for block in range(args.blocks):
            on = block % 2 == 0
            for i in range(BLOCK):
                w0, c0 = time.perf_counter(), time.thread_time()
                step(recorder if on else Nothing(), a, out, times)
                if on:
                    record = recorder.end_step(block * BLOCK + i, tokens=1, loss=1.0, flops=flops)
                    gather.add(record)
                    window = gather.exchange()
                    if window is not None:
                        reading.submit(show, window, record)
                wall[on].append(time.perf_counter() - w0)
                cpu[on].append(time.thread_time() - c0)
        recorder.finish("done")
        reading.shutdown()
        watch.close()
        sinks.finish({})
    found = {
        "step_ms_off": round(1e3 * float(np.median(wall[False])), 3),
        "median_wall_slower_pct": round(100 * float(np.median(wall[True]) / np.median(wall[False]) - 1), 3),
        "median_cpu_slower_pct": round(100 * float(np.median(cpu[True]) / np.median(cpu[False]) - 1), 3),
        "added_cpu_us_a_step": round(1e6 * float(np.median(cpu[True]) - np.median(cpu[False])), 1),
        "collectives_a_step": COLLECTIVES, "steps_each": len(wall[True]), "load_average": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
