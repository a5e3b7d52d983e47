"""What this machine can do."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import arg, command

BENCH = (
    arg("--processes", type=int, nargs="+", default=[1], metavar="N", help="how many work at the same time"),
    arg("--seconds", type=float, default=1.0, metavar="S", help="how long each measurement lasts"),
    arg("--device", default="cpu", choices=["cpu", "cuda"]),
    arg("--threads", type=int, metavar="N", help="threads a process; default: cores / processes"),
    arg("--json", action="store_true", help="print the results as JSON"),
)


@command(
    "bench matmul",
    "measure this machine's matmul ceiling, against which MFU on unknown hardware is counted",
    arg("--dtype", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp16"]),
    *BENCH,
)
def _bench_matmul(args: argparse.Namespace) -> None:
    from trainsys.bench.matmul import run_cli

    run_cli(args.dtype, args.processes, args.seconds, args.device, args.threads, args.json)


@command("bench memory", "measure this machine's memory bandwidth", *BENCH)
def _bench_memory(args: argparse.Namespace) -> None:
    from trainsys.bench.memory import run_cli

    run_cli(args.processes, args.seconds, args.device, args.threads, args.json)
