"""The command line: parses arguments and calls one function a command, imported only then.

To add a command, write a function that takes the parsed arguments, import what it calls inside it, and
put `command` on it. A name of two words, like ``config show``, makes a group.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from trainsys import __version__
from trainsys.errors import EXIT_USER_ERROR, UserError

Run = Callable[[argparse.Namespace], "int | None"]
Argument = tuple[tuple[str, ...], dict[str, Any]]

_COMMANDS: dict[str, tuple[Run, str, tuple[Argument, ...]]] = {}


def arg(*names: str, **options: Any) -> Argument:
    """One argument, as `argparse.ArgumentParser.add_argument` takes it."""
    return names, options


def command(name: str, summary: str, *arguments: Argument) -> Callable[[Run], Run]:
    """Register the decorated function as the command ``name``."""

    def register(run: Run) -> Run:
        _COMMANDS[name] = (run, summary, arguments)
        return run

    return register


RUN = arg("run", metavar="RUN.yaml", help="a config file, or the name of one that comes with trainsys")
OVERRIDES = arg(
    "overrides", metavar="section.key=value", nargs="*", help="laid over the file, e.g. parallel.tp=2"
)


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
    arg("--stack", default="native", help="software whose memory and speed is predicted"),
    arg("--dtype", choices=["bf16", "fp8", "fp4"], help="of matmuls; the run's own where left out"),
    arg("--write", metavar="FILE", help="the run with the winning layout, as a config"),
    arg("--show-schedule", nargs="?", const=True, default=False, metavar="FILE.svg", help="draw the pipeline"),
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


@command("train", "what every process of a run executes, under torchrun or alone", RUN, OVERRIDES)
def _train(args: argparse.Namespace) -> int | None:
    from trainsys.config.loader import load_run
    from trainsys.launch.failure import guard

    with guard():
        # A mistake in the config is told now, not after the seconds that torch takes to import.
        load_run(args.run, args.overrides)
        from trainsys.train.main import train

        return train(args.run, args.overrides)


@command("preflight", "check all nodes before step 0: devices, memory, network, disk, versions", RUN, OVERRIDES)
def _preflight(args: argparse.Namespace) -> int | None:
    from trainsys.config.loader import load_run
    from trainsys.launch.failure import guard

    with guard():
        load_run(args.run, args.overrides)
        from trainsys.train.preflight import preflight

        return preflight(args.run, args.overrides)


@command(
    "flops",
    "what a token of a run costs, by component and convention",
    RUN,
    OVERRIDES,
    arg("--json", action="store_true", help="print as JSON"),
)
def _flops(args: argparse.Namespace) -> None:
    from trainsys.flops.report import run_cli

    run_cli(args.run, args.overrides, args.json)


@command(
    "explain",
    "where each percent of a run's time went, who lost it, what to change; from its files",
    arg("run_dir", metavar="RUN_DIR"),
    arg("--html", metavar="FILE", help="also write a page that needs no network"),
    arg("--json", action="store_true", help="print as JSON"),
)
def _explain(args: argparse.Namespace) -> None:
    from trainsys.profiler.main import run_cli

    run_cli(args.run_dir, args.html, args.json)


@command(
    "wandb workspace",
    "make the W&B dashboard of a project: where MFU goes, loss, memory",
    arg("project", metavar="PROJECT"),
    arg("--entity", default="", help="team or user; default: the login's own"),
    arg("--json", action="store_true", help="print it instead of sending it to the server"),
)
def _wandb_workspace(args: argparse.Namespace) -> None:
    from trainsys.telemetry.sinks.wandb_workspace import save_workspace, workspace_json

    print((workspace_json if args.json else save_workspace)(args.project, args.entity))


BENCH = (
    arg("--processes", type=int, nargs="+", default=[1], metavar="N", help="how many work at the same time"),
    arg("--seconds", type=float, default=1.0, metavar="S", help="how long each measurement lasts"),
    arg("--device", default="cpu", choices=["cpu", "cuda"]),
    arg("--threads", type=int, metavar="N", help="threads a process; default: cores / processes"),
    arg("--json", action="store_true", help="print the results as JSON"),
)


@command(
    "trace",
    "analyse profiler traces, flight-recorder dumps and memory snapshots of any framework",
    arg("paths", nargs="+", metavar="PATH", help="files or folders; kinds are recognised by content"),
    arg("--against", nargs="+", metavar="PATH", help="an earlier run: say what got slower since"),
    arg("--json", metavar="FILE", help="write the report as JSON"),
    arg("--html", metavar="FILE", help="write a self-contained page"),
    arg("--perfetto", metavar="FILE", help="write an annotated timeline (.gz: compressed)"),
    arg("--model", metavar="RUN.yaml", help="config whose model was trained, for MFU"),
    arg("--tokens-per-step", type=int, metavar="N", help="of all ranks together, for MFU"),
    arg("--device", metavar="NAME", help="catalogue name, where the trace's own is missing or wrong"),
    arg("--workers", type=int, metavar="N", help="processes that read; as many as cores where left out"),
    arg("--max-bytes", type=int, metavar="N", help="refuse files that are larger once decompressed"),
    arg("--keep-truncated", action="store_true", help="use the whole events of files that were cut off"),
)
def _trace(args: argparse.Namespace) -> None:
    from trainsys.profiler.trace.main import run

    model, seq_len = None, None
    if args.model is not None:
        from trainsys.config.loader import load_run

        config = load_run(args.model)
        model, seq_len = config.model, config.train.seq_len
    text = run(
        args.paths,
        args.json,
        args.html,
        args.perfetto,
        model,
        seq_len=seq_len,
        tokens_per_step=args.tokens_per_step,
        device=args.device,
        against=args.against,
        workers=args.workers,
        keep_truncated=args.keep_truncated,
        max_bytes=args.max_bytes,
    )
    print(text)


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


@command("config show", "print everything a run resolves to", RUN, OVERRIDES)
def _config_show(args: argparse.Namespace) -> None:
    from trainsys.config.loader import load_run, resolved_yaml

    print(resolved_yaml(load_run(args.run, args.overrides)), end="")


@command("config schema", "print the JSON schema of run configs, for editors")
def _config_schema(args: argparse.Namespace) -> None:
    import json

    from trainsys.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@command(
    "data prepare",
    "tokenize text into shards that are read in place",
    arg("output", metavar="OUT_DIR", help="new folder for the shards"),
    arg("--input", metavar="PATH", help="file, folder or glob; with --source hf the name of a dataset"),
    arg(
        "--source",
        choices=["stdlib", "text", "jsonl", "parquet", "hf"],
        help="what the input is; told from its suffix where this is left out",
    ),
    arg("--tokenizer", default="bytes", help="'bytes', or a tokenizer.json path or name (hf extra)"),
    arg("--text-key", default="text", metavar="KEY", help="field of a record that holds the text"),
    arg("--split", default="train", help="of stdlib and hf sources: train, valid …"),
    arg("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in one shard"),
)
def _data_prepare(args: argparse.Namespace) -> None:
    from trainsys.data.prepare import prepare

    prepare(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        text_key=args.text_key,
        shard_tokens=args.shard_tokens,
        source=args.source,
        split=args.split,
    )


@command("data verify", "read shards whole and check them", arg("path", help="shard folder, file or glob"))
def _data_verify(args: argparse.Namespace) -> None:
    from trainsys.data.prepare import verify

    print(verify(args.path))


CKPT = arg("checkpoint", metavar="CKPT", help="a checkpoint, or a run's checkpoint folder for its newest")


@command("ckpt ls", "list a run's checkpoints", arg("folder", metavar="FOLDER"))
def _ckpt_ls(args: argparse.Namespace) -> None:
    from trainsys.checkpoint.inspect import ls

    print(ls(args.folder))


@command("ckpt inspect", "what a checkpoint holds", CKPT)
def _ckpt_inspect(args: argparse.Namespace) -> None:
    from trainsys.checkpoint.inspect import inspect

    print(inspect(args.checkpoint))


@command(
    "ckpt verify",
    "read a checkpoint whole, or all of a run's, and name what is damaged",
    arg("path", metavar="CKPT_OR_FOLDER"),
)
def _ckpt_verify(args: argparse.Namespace) -> int:
    from trainsys.checkpoint.inspect import verify

    damaged = verify(args.path)
    print("\n".join(damaged) or f"{args.path}: good")
    return 1 if damaged else 0


@command(
    "ckpt diff",
    "compare two checkpoints of any layouts, element by element",
    CKPT,
    arg("other", metavar="OTHER"),
)
def _ckpt_diff(args: argparse.Namespace) -> int:
    from trainsys.checkpoint.convert import diff

    lines = diff(args.checkpoint, args.other)
    print("\n".join(lines) or "equal to the bit")
    return 1 if lines else 0


@command(
    "ckpt convert",
    "rewrite a checkpoint with whole tensors, or for torch.distributed.checkpoint",
    CKPT,
    arg("output", metavar="OUT", help="new folder"),
    arg("--to", choices=["whole", "dcp"], default="whole"),
    arg("--weights-only", action="store_true", help="leave the optimizer's moments out"),
)
def _ckpt_convert(args: argparse.Namespace) -> None:
    from trainsys.checkpoint.convert import convert

    print(convert(args.checkpoint, args.output, to=args.to, weights_only=args.weights_only))


@command(
    "ckpt export",
    "write a checkpoint's weights as a Hugging Face folder",
    CKPT,
    arg("output", metavar="OUT", help="new folder"),
    arg("--dtype", choices=["F32", "BF16", "F16"], default="BF16"),
)
def _ckpt_export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from trainsys.checkpoint.hf import export
    from trainsys.checkpoint.inspect import resolve

    print("\n".join(map(str, export(resolve(args.checkpoint), Path(args.output), args.dtype))))


@command(
    "ckpt import",
    "make a Hugging Face folder step 0 of a run's checkpoints",
    arg("source", metavar="HF_DIR"),
    arg("folder", metavar="FOLDER", help="the run's checkpoint folder"),
)
def _ckpt_import(args: argparse.Namespace) -> None:
    from pathlib import Path

    from trainsys.checkpoint.hf import import_

    print(import_(Path(args.source), Path(args.folder)))


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line become UserError, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        from trainsys.launch.failure import user_error_lines

        sys.stderr.write(user_error_lines(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is wrong. Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"trainsys {__version__}")
        return 0
    name, rest = _find(argv)
    if name is None:
        return 0
    run, summary, arguments = _COMMANDS[name]
    parser = _Parser(prog=f"trainsys {name}", description=summary, allow_abbrev=False)
    for names, options in arguments:
        parser.add_argument(*names, **options)
    return run(parser.parse_intermixed_args(rest)) or 0


def _find(argv: list[str]) -> tuple[str | None, list[str]]:
    """The command that ``argv`` names and what follows; None where a group's help was printed."""
    first = argv[0]
    if len(argv) > 1 and f"{first} {argv[1]}" in _COMMANDS:
        return f"{first} {argv[1]}", argv[2:]
    if first in _COMMANDS:
        return first, argv[1:]
    members = [name for name in _COMMANDS if name.startswith(f"{first} ")]
    if members:
        if len(argv) > 1 and argv[1] in ("-h", "--help"):
            print(_overview(members))
            return None, []
        known = [name.split()[1] for name in members]
        if len(argv) == 1:
            raise UserError(f"trainsys {first}: say what: {' or '.join(known)}")
        raise UserError(_unknown(f"{first} ", argv[1], known))
    raise UserError(_unknown("", first, sorted({name.split()[0] for name in _COMMANDS})))


def _unknown(group: str, word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    hint = f"did you mean trainsys {group}{close[0]}?" if close else f"there are {', '.join(known)}"
    return f"unknown command {group}{word}; {hint}"


def _overview(names: Sequence[str] | None = None) -> str:
    shown = list(names or _COMMANDS)
    width = max(map(len, shown))
    return "\n".join(
        [
            "usage: trainsys COMMAND …          trainsys COMMAND --help for its arguments",
            "",
            *(f"  {name:<{width}}  {_COMMANDS[name][1]}" for name in shown),
            "",
            f"  {'--version':<{width}}  print the version",
        ]
    )
