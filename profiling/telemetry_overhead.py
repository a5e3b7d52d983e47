"""What telemetry costs a step: all of it on, against all of it off, alternating in blocks of one run.

    python profiling/telemetry_overhead.py --blocks 60 --out profiling/results/telemetry_overhead.json

A step is 50 ms of real matrix products, cut into phases and collectives as a model's would be. "On" is what a training
run has: the ledger's span around every collective, recorder and event file, memory, FLOPs and MFU, each step's window of
all ranks, live waterfall and blame, and every sink there is (console, JSON lines, TensorBoard, Prometheus, W&B
offline; ``--sinks none``: JSON lines alone). "Off" is the same work without any of it.

Medians of steps are compared; beside them those of the quickest tenth of steps, which other load on the machine moves
least. The first steps of a block count for neither: what the block before has left to threads in
the background runs in them. The interval is of the ratio, from resampled pairs of blocks. Mean and CPU time stand beside
the medians, because work in the background hits few steps and the median does not see it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from trainsys.comm.ledger import Ledger  # noqa: E402
from trainsys.config.loader import load_run  # noqa: E402
from trainsys.data.loader import StepData  # noqa: E402
from trainsys.data.packing import Batch, Counts  # noqa: E402
from trainsys.engines.base import StepResult  # noqa: E402
from trainsys.layout import Layout  # noqa: E402
from trainsys.train.process import Process  # noqa: E402
from trainsys.train.report import Reporter  # noqa: E402

BLOCK, LEFT_OUT = 18, 6
SHARES = (("forward", 1), ("backward", 2), ("optimizer", 1))
EVERY_SINK = (
    "telemetry.console=plain", "telemetry.tensorboard=true", "telemetry.prometheus_port=19417",
    "telemetry.wandb.mode=offline",
)  # fmt: skip
Span = Callable[[str, str, int], AbstractContextManager[None]]
Phase = Callable[[str], AbstractContextManager[None]]
_nothing: AbstractContextManager[None] = nullcontext()


def work(a: torch.Tensor, out: torch.Tensor, times: int, collectives: int, phase: Phase, span: Span) -> None:
    with phase("data"):
        pass
    for name, share in SHARES:
        with phase(name):
            left = collectives * share // 4
            for _ in range(times * share // 4):
                torch.mm(a, a, out=out)
                if left > 0:
                    left -= 1
                    with span("tp", "all_reduce", 4096):
                        pass


def calibrate(a: torch.Tensor, out: torch.Tensor, step_ms: float) -> int:
    """Products that take ``step_ms``."""
    took = []
    for _ in range(20):
        t0 = time.perf_counter()
        for _ in range(100):
            torch.mm(a, a, out=out)
        took.append((time.perf_counter() - t0) / 100)
    return round(step_ms / 1e3 / float(np.median(took)))


def measure(reporter: Reporter, args: argparse.Namespace) -> npt.NDArray[np.float64]:
    """[blocks, off/on, steps, wall/CPU of the step's thread/CPU of the process] in seconds."""
    ledger = Ledger()
    ledger.recorder = reporter.recorder
    a, out = torch.randn(96, 96), torch.empty(96, 96)
    times = max(4 * args.collectives, calibrate(a, out, args.step_ms))
    counts = Counts(4096, 4096, 0, 4096 * 128)
    empty = np.zeros((8, 512), np.int64)
    data = StepData(0, [Batch(empty, empty, empty, None, counts)], 4096, 4096, 0, counts.attn_pairs)
    result = StepResult(torch.tensor([2.5, 1.0]), 3e-4, torch.zeros(1))
    seconds = np.zeros((args.blocks, 2, BLOCK, 3))
    number = 0
    reporter.begin()
    for block in range(args.blocks):
        for on in (False, True) if block % 2 else (True, False):
            pause = _nothing if on else reporter.recorder.stall("report", "a block that is off")
            with pause:
                for i in range(BLOCK):
                    began = time.perf_counter(), time.thread_time(), time.process_time()
                    if on:
                        work(a, out, times, args.collectives, reporter.recorder.phase, ledger.span)
                        reporter.end_step(number, data, result)
                        number += 1
                    else:
                        work(a, out, times, args.collectives, lambda name: _nothing, lambda *what: _nothing)
                    ended = time.perf_counter(), time.thread_time(), time.process_time()
                    seconds[block, int(on), i] = np.subtract(ended, began)
    return seconds[:, :, LEFT_OUT:]


def summary(seconds: npt.NDArray[np.float64], collectives: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def slower(how: Callable[..., Any], what: int, blocks: npt.NDArray[np.int64]) -> float:
        off, on = (how(seconds[blocks, i, :, what]) for i in (0, 1))
        return 100 * float(on / off - 1)

    def quick(x: npt.NDArray[np.float64]) -> float:
        return float(np.quantile(x, 0.1))

    every = np.arange(len(seconds))
    draws = [slower(np.median, 0, rng.choice(every, every.size)) for _ in range(1000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    thread = np.median(seconds[:, :, :, 1], axis=(0, 2))
    return {
        "step_ms_off": round(1e3 * float(np.median(seconds[:, 0, :, 0])), 3),
        "median_wall_slower_pct": round(slower(np.median, 0, every), 3),
        "interval_95_pct": [round(float(low), 3), round(float(high), 3)],
        "quickest_tenth_wall_slower_pct": round(slower(quick, 0, every), 3),
        "quickest_tenth_cpu_slower_pct": round(slower(quick, 1, every), 3),
        "mean_wall_slower_pct": round(slower(np.mean, 0, every), 3),
        "median_cpu_slower_pct": round(slower(np.median, 1, every), 3),
        "added_cpu_us_a_step": round(1e6 * float(thread[1] - thread[0]), 1),
        "added_cpu_us_a_step_all_threads": round(1e6 * float(np.diff(seconds[:, :, :, 2].mean(axis=(0, 2)))[0]), 1),
        "collectives_a_step": collectives, "steps_each": int(seconds.shape[0] * seconds.shape[2]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30, help=f"of {BLOCK} steps on and {BLOCK} off each")
    parser.add_argument("--collectives", type=int, default=60)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--sinks", choices=["all", "none"], default="all")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_run(str(ROOT / "configs/train/demo.yaml"), (
            f"telemetry.out={folder}", f"train.steps={args.blocks * BLOCK}", "telemetry.console=off",
            "parallel.dp_shard=1", "parallel.tp=1", "parallel.sequence_parallel=false",
            *(EVERY_SINK if args.sinks == "all" else ()),
        ))  # fmt: skip
        layout = Layout.resolve(cfg.parallel, 1)
        proc = Process(0, 1, 0, 1, torch.device("cpu"))
        with Reporter(cfg, proc, layout, (time.perf_counter(), time.time()), {}) as reporter:
            seconds = measure(reporter, args)
            reporter.done()
    found = {
        **summary(seconds, args.collectives), "sinks": args.sinks, "load_average_before": round(load, 2),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
