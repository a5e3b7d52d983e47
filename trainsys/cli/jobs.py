"""Jobs that were started."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import arg, command


@command(
    "jobs ls",
    "list the jobs and runs of a folder with their state, step and MFU",
    arg("folder", nargs="?", default="runs", metavar="RUNS", help="telemetry.out of the runs"),
)
def _jobs_ls(args: argparse.Namespace) -> None:
    from trainsys.launch.jobs import ls

    print(ls(args.folder))


JOB = arg("job", metavar="JOB", help="a job's id, name or folder")
JOBS_FOLDER = arg("--folder", default="runs", metavar="RUNS", help="telemetry.out of the runs")


@command(
    "jobs logs",
    "print the logs of a job's ranks, merged",
    JOB,
    JOBS_FOLDER,
    arg("--rank", type=int, metavar="N", help="of this rank only"),
    arg("--follow", action="store_true", help="go on until the job is over"),
)
def _jobs_logs(args: argparse.Namespace) -> int:
    from trainsys.launch.jobs import logs

    return logs(args.job, args.folder, args.rank, args.follow)


@command("jobs stop", "cancel a job; it saves first", JOB, JOBS_FOLDER)
def _jobs_stop(args: argparse.Namespace) -> None:
    from trainsys.launch.jobs import stop

    print(stop(args.job, args.folder))
