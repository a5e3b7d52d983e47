"""Starting runs."""

from __future__ import annotations

import argparse
import os

from trainsys.cli.registry import OVERRIDES, RUN, arg, command
from trainsys.errors import UserError


@command(
    "launch",
    "start a run: all of its processes",
    RUN,
    OVERRIDES,
    arg(
        "--on",
        choices=["local", "slurm", "kubernetes", "skypilot"],
        required=True,
        help="where; local is this machine, by torchrun",
    ),
    arg("--nproc", type=int, metavar="N", help="local: processes, where the layout leaves it open"),
    arg(
        "--grid",
        action="append",
        default=[],
        metavar="section.key=V,V",
        help="slurm: an array with a task for each combination of values",
    ),
    arg("--dry-run", action="store_true", help="print the command or job file and start nothing"),
    arg("--detach", action="store_true", help="submit and return; otherwise the log is followed to the end"),
)
def _launch(args: argparse.Namespace) -> int:
    if args.on == "local":
        from trainsys.launch.local import launch

        if args.grid or args.detach:
            raise UserError("--grid and --detach are for schedulers; --on local runs one and waits for it")
        return launch(args.run, args.overrides, args.nproc, args.dry_run)
    from trainsys.launch.submit import submit

    return submit(args.on, args.run, args.overrides, args.grid, args.nproc, args.dry_run, args.detach)


@command("train", "what every process of a run executes, under torchrun or alone", RUN, OVERRIDES)
def _train(args: argparse.Namespace) -> int | None:
    from trainsys.config.loader import load_run
    from trainsys.failure import guard
    from trainsys.launch.rank import adopt

    with guard():
        adopt(os.environ)
        # A mistake in the config is told now, not after the seconds that torch takes to import.
        load_run(args.run, args.overrides)
        from trainsys.train.main import train

        return train(args.run, args.overrides)


@command(
    "preflight", "check all nodes before step 0: devices, memory, network, disk, versions", RUN, OVERRIDES
)
def _preflight(args: argparse.Namespace) -> int | None:
    from trainsys.config.loader import load_run
    from trainsys.failure import guard
    from trainsys.launch.rank import adopt

    with guard():
        adopt(os.environ)
        load_run(args.run, args.overrides)
        from trainsys.train.preflight import preflight

        return preflight(args.run, args.overrides)
