"""Before a run: which layout."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import OVERRIDES, RUN, arg, command


@command(
    "plan",
    "rank the layouts of a run on a cluster, with MFU and memory predicted",
    RUN,
    OVERRIDES,
    arg("--cluster", required=True, metavar="NAME", help="one of configs/clusters, or a file"),
    arg("--gpus", type=int, metavar="N", help="devices, where the cluster file does not say"),
    arg("--top", type=int, default=10, metavar="N", help="rows to print"),
    arg("--why", metavar="tp=8,pp=2", help="why this layout of yours did not win"),
    arg("--limit", action="append", default=[], metavar="'tp<=8'", help="keep to it; may be repeated"),
    arg("--margin", type=float, default=0.05, metavar="SHARE", help="device memory that stays free"),
    arg("--stack", help="software whose memory and speed is predicted; the run's engine where left out"),
    arg("--dtype", choices=["bf16", "fp8", "fp4"], help="of matmuls; the run's own where left out"),
    arg("--write", metavar="FILE", help="the run with the winning layout, as a config"),
    arg("--calibration", metavar="FILE", help="of trainsys sweep --calibration, or the JSON of trainsys bench"),
    arg(
        "--show-schedule", nargs="?", const=True, default=False, metavar="FILE.svg", help="draw the pipeline"
    ),
    arg("--json", action="store_true", help="print as JSON"),
)
def _plan(args: argparse.Namespace) -> None:
    from trainsys.planner.main import plan

    plan(
        args.run,
        args.cluster,
        args.overrides,
        gpus=args.gpus,
        json=args.json,
        top=args.top,
        write=args.write,
        limits=args.limit,
        margin=args.margin,
        why=args.why,
        stack=args.stack,
        dtype=args.dtype,
        show_schedule=args.show_schedule,
        calibration=args.calibration,
    )


@command(
    "plan backtest",
    "predict published runs and say how far off",
    arg("csv", metavar="RUNS.csv"),
    arg("--anchor", choices=["none", "one"], default="none", help="one: a measured run scales the others"),
    arg("--leave-out", action="store_true", help="refit for each source without its rows (minutes)"),
    arg("--json", action="store_true", help="print as JSON"),
)
def _plan_backtest(args: argparse.Namespace) -> None:
    from trainsys.planner.backtest import run

    run(args.csv, args.anchor, args.json, args.leave_out)


@command(
    "dryrun",
    "run a rank's real step without devices: FLOPs, bytes by axis, peak memory by part, at any world size",
    RUN,
    OVERRIDES,
    arg("--world", type=int, required=True, metavar="N", help="ranks of the run"),
    arg("--rank", default="0", metavar="R", help="which one; all: one of each kind that differs"),
    arg("--json", action="store_true", help="print as JSON"),
)
def _dryrun(args: argparse.Namespace) -> None:
    from trainsys.config.loader import load_run

    load_run(args.run, args.overrides)  # a mistake is told before the seconds that torch takes to import
    from trainsys.dryrun.main import dryrun

    dryrun(args.run, args.overrides, world=args.world, rank=args.rank, json=args.json)


@command(
    "sweep",
    "run many layouts of one run for a few steps each; one leaderboard, predicted beside measured",
    arg("sweep", metavar="SWEEP.yaml", help="base run and points: grid, points, or the planner's best"),
    arg("--on", choices=["local", "slurm"], default="local", help="slurm: one array"),
    arg("--cluster", metavar="NAME", help="predict step times on this machine"),
    arg("--calibration", metavar="FILE", help="refit the planner to what finished, into this file"),
    arg("--html", metavar="FILE", help="also write a page that needs no network"),
    arg("--show", action="store_true", help="run nothing, show what has ended"),
    arg("--dry-run", action="store_true", help="print what would be run"),
    arg("--detach", action="store_true", help="slurm: submit and return"),
    arg("--json", action="store_true", help="print the leaderboard as JSON"),
)
def _sweep(args: argparse.Namespace) -> int:
    from trainsys.sweep.main import sweep

    return sweep(
        args.sweep,
        on=args.on,
        cluster=args.cluster,
        calibration=args.calibration,
        html=args.html,
        json=args.json,
        dry_run=args.dry_run,
        detach=args.detach,
        show=args.show,
    )
