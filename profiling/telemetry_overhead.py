"""What telemetry costs a step: all of it on, against all of it off, alternating in blocks of one run.

    python profiling/telemetry_overhead.py --blocks 60 --out profiling/results/telemetry_overhead.json

A step is 50 ms of real matmuls, cut into phases and collectives as a model's would be. "On" is what a training
run has: the ledger's span around every collective, recorder and event file, memory, FLOPs and MFU, each step's window of
all ranks, live waterfall and blame, and every sink there is (console, JSON lines, TensorBoard, Prometheus, W&B
offline; ``--sinks none``: JSON lines alone). "Off" is the same work without any of it.

Compared are medians of steps, block by block, so that a machine whose speed drifts moves both alike; the median of
those ratios, and its interval from resampled blocks. Beside it the same of each block's quickest tenth of steps, which
other load moves least, and of mean and CPU time, because work in the background hits few steps and a median does not see
it; and what the desk, the process of sinks and live blame, takes of another core. The first steps of a block count for
neither: what the block before has left to the background runs in them.
"""

from __future__ import annotations

import argparse
import os
import resource
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
from recorded import record  # noqa: E402

from trainsys.comm.ledger import Ledger  # noqa: E402
from trainsys.config.loader import load_run  # noqa: E402
from trainsys.data.loader import StepData  # noqa: E402
from trainsys.data.packing import Batch, Counts  # noqa: E402
from trainsys.engines.base import StepResult  # noqa: E402
from trainsys.layout import Layout  # noqa: E402
from trainsys.train.process import Process  # noqa: E402
from trainsys.train.report import Reporter  # noqa: E402

BLOCK, LEFT_OUT = 18, 6
WARM_S = 3.0
DESK_STARTS_S = 5.0
"""Until it has imported what it needs, beside which the machine is slower than afterwards."""
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
    """Products that take ``step_ms``, on a core that has worked for a while."""
    times, began = 100, time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        t0 = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a, out=out)
        times = max(1, round(times * step_ms / 1e3 / (time.perf_counter() - t0)))
    return times


def measure(reporter: Reporter, args: argparse.Namespace) -> npt.NDArray[np.float64]:
    """[blocks, off/on, steps, wall/CPU of the step's thread/CPU of the process] in seconds."""
    ledger = Ledger()
    ledger.recorder = reporter.recorder
    a, out = torch.randn(96, 96), torch.empty(96, 96)
    time.sleep(DESK_STARTS_S)
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
    def slower(how: Callable[..., Any], what: int = 0) -> npt.NDArray[np.float64]:
        """Slowdown of each block, in percent."""
        taken = how(seconds[..., what], axis=2)
        found: npt.NDArray[np.float64] = 100 * (taken[:, 1] / taken[:, 0] - 1)
        return found

    def quick(x: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = np.quantile(x, 0.1, axis=axis)
        return found

    def middle(x: npt.NDArray[np.float64]) -> float:
        return round(float(np.median(x)), 3)

    rng = np.random.default_rng(0)
    wall = slower(np.median)
    low, high = np.percentile([np.median(rng.choice(wall, wall.size)) for _ in range(2000)], [2.5, 97.5])
    added = np.median(seconds[:, 1] - seconds[:, 0], axis=1)
    return {
        "step_ms_off": round(1e3 * float(np.median(seconds[:, 0, :, 0])), 3),
        "median_wall_slower_pct": middle(wall),
        "interval_95_pct": [round(float(low), 3), round(float(high), 3)],
        "quickest_tenth_wall_slower_pct": middle(slower(quick)),
        "mean_wall_slower_pct": middle(slower(np.mean)),
        "median_cpu_slower_pct": middle(slower(np.median, 1)),
        "added_wall_us_a_step": round(1e6 * float(np.median(added[:, 0])), 1),
        "added_cpu_us_a_step": round(1e6 * float(np.median(added[:, 1])), 1),
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
    desk = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        **summary(seconds, args.collectives),
        "desk_cpu_us_a_step": round(1e6 * (desk.ru_utime + desk.ru_stime) / (args.blocks * BLOCK), 1),
        "sinks": args.sinks, "load_average_before": round(load, 2),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    record(found, args.out)


if __name__ == "__main__":
    main()
