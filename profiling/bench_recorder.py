"""What telemetry costs a step: microseconds in the recorder, with the phases and collectives of a real step.

    python profiling/bench_recorder.py [--steps 2000] [--micro-batches 4] [--layers 12] [--out FILE]

First wall time of the recorder alone; then CPU time of the step's thread for all that a training loop does, 60 spans of
the ledger and the reporter's end of a step: with caches as the last step left them, and after four megabytes of other
work. CPU time and its quickest tenth are what a busy machine moves least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from recorded import record  # noqa: E402

from trainsys.comm.ledger import Ledger  # noqa: E402
from trainsys.config.loader import load_run  # noqa: E402
from trainsys.data.loader import StepData  # noqa: E402
from trainsys.data.packing import Batch, Counts  # noqa: E402
from trainsys.engines.base import StepResult  # noqa: E402
from trainsys.layout import Layout  # noqa: E402
from trainsys.telemetry.events import Flops  # noqa: E402
from trainsys.telemetry.recorder import Recorder, here  # noqa: E402
from trainsys.telemetry.timer import HostTimer  # noqa: E402
from trainsys.train.process import Process  # noqa: E402
from trainsys.train.report import Reporter  # noqa: E402


def one_step(rec: Recorder, step: int, micro_batches: int, layers: int, spans: bool) -> None:
    """The recorder calls of one step: fsdp and tp collectives in each layer, forward and backward."""
    with rec.phase("data"):
        pass
    for _ in range(micro_batches):
        for phase in ("forward", "backward"):
            with rec.phase(phase):
                for _ in range(layers):
                    for axis, op in (("fsdp", "all_gather"), ("tp", "reduce_scatter")):
                        if spans:
                            with rec.collective_span(axis, op, 1 << 20):
                                pass
                        else:
                            rec.collective(axis, op, 1 << 20, 1e-7)
    with rec.phase("optimizer"):
        pass
    flops = Flops(1e12, 1.1e12, 1.3e12)
    rec.end_step(step, tokens=8192, attn_pairs=1 << 25, loss=2.5, grad_norm=1.0, lr=3e-4, flops=flops)


def measure(rec: Recorder, steps: int, *what: int) -> list[float]:
    """Sorted microseconds of each step."""
    times = []
    rec.begin()
    for step in range(steps):
        t0 = time.perf_counter_ns()
        one_step(rec, step, *what)
        times.append((time.perf_counter_ns() - t0) / 1e3)
    rec.finish("done")
    return sorted(times)


def of_a_loop(folder: str, steps: int, cold: bool) -> dict[str, float]:
    """CPU microseconds of the step's thread: quickest tenth and median of the spans and of the end of a step."""
    cfg = load_run(str(ROOT / "configs/train/demo.yaml"), (
        f"telemetry.out={folder}", f"train.steps={steps + 1}", "telemetry.console=off", "parallel.dp_shard=1",
        "parallel.tp=1", "parallel.sequence_parallel=false",
    ))  # fmt: skip
    counts = Counts(4096, 4096, 0, 4096 * 128)
    empty, other = np.zeros((8, 512), np.int64), np.ones(1 << 19)
    data = StepData(0, [Batch(empty, empty, empty, None, counts)], 4096, 4096, 0, counts.attn_pairs)
    result = StepResult(torch.tensor([2.5, 1.0]), 3e-4, torch.zeros(1))
    layout, ledger = Layout.resolve(cfg.parallel, 1), Ledger()
    spans, ends = [], []
    with Reporter(cfg, Process(0, 1, 0, 1, torch.device("cpu")), layout, (time.perf_counter(), time.time()), {}) as r:
        ledger.recorder = r.recorder
        r.begin()
        for step in range(steps):
            if cold:
                other += 1.0
            t0 = time.thread_time_ns()
            for phase in ("forward", "backward", "optimizer"):
                with r.recorder.phase(phase):
                    for _ in range(20):
                        with ledger.span("tp", "all_reduce", 4096):
                            pass
            t1 = time.thread_time_ns()
            if cold:
                other += 1.0
            t2 = time.thread_time_ns()
            r.end_step(step, data, result)
            spans.append((t1 - t0) / 1e3)
            ends.append((time.thread_time_ns() - t2) / 1e3)
        r.recorder.finish("done")
    return {
        f"{name}_{how}_us": round(float(np.quantile(values, q)), 1)
        for name, values in (("sixty_collectives", spans), ("end_of_step", ends))
        for how, q in (("quickest_tenth", 0.1), ("median", 0.5))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out")
    args = parser.parse_args()
    calls = args.micro_batches * args.layers * 4
    print(
        f"{args.steps} steps, {args.micro_batches} micro-batches, {calls} collectives; microseconds per step:"
    )
    clock_us = min(timeit.repeat(time.perf_counter_ns, number=10_000, repeat=5)) * 100
    print(f"  {'(one reading of the clock':34}        {clock_us:7.2f})")
    with tempfile.TemporaryDirectory() as folder:
        for name, timer, micro, layers, spans in (
            ("one micro-batch, no collectives", None, 1, 0, False),
            ("collectives told afterwards", None, args.micro_batches, args.layers, False),
            ("collectives as spans", None, args.micro_batches, args.layers, True),
            ("spans with device marks", HostTimer(), args.micro_batches, args.layers, True),
        ):
            info = here(run_id="bench", rank=0, world=4, peak_flops=1e11)
            rec = Recorder(Path(folder, name.replace(" ", "_")), info, timer=timer)
            times = measure(rec, args.steps, micro, layers, spans)
            print(
                f"  {name:34} median {statistics.median(times):7.1f}"
                f"   p99 {times[int(0.99 * len(times))]:7.1f}   max {times[-1]:8.1f}"
            )
        torch.set_num_threads(1)
        found: dict[str, Any] = {
            name: of_a_loop(folder, args.steps // 2, cold) for name, cold in (("warm", False), ("cold", True))
        }
    found["load_average"] = round(os.getloadavg()[0], 1)
    record(found, args.out)


if __name__ == "__main__":
    main()
