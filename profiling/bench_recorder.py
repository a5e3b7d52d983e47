"""What telemetry costs a step: microseconds in the recorder, with the phases and collectives of a real step.

python profiling/bench_recorder.py [--steps 2000] [--micro-batches 4] [--layers 12]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import timeit
from pathlib import Path

from trainsys.telemetry.events import Flops
from trainsys.telemetry.recorder import Recorder, here
from trainsys.telemetry.timer import HostTimer


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    calls = args.micro_batches * args.layers * 4
    print(
        f"{args.steps} steps, {args.micro_batches} micro-batches, {calls} collectives; microseconds a step:"
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


if __name__ == "__main__":
    main()
