"""What runs and traces tell."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import OVERRIDES, RUN, arg, command


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


@command(
    "trace",
    "analyse profiler traces, flight-recorder dumps and memory snapshots of any framework",
    arg("paths", nargs="+", metavar="PATH", help="files or folders; kinds are recognised by content"),
    arg("--against", nargs="+", metavar="PATH", help="an earlier run: say what got slower since"),
    arg("--json", metavar="FILE", help="write the report as JSON"),
    arg("--html", metavar="FILE", help="write a self-contained page"),
    arg("--perfetto", metavar="FILE", help="write an annotated timeline (.gz: compressed)"),
    arg("--model", metavar="RUN.yaml", help="config whose model was trained, for MFU"),
    arg(
        "--seq-len", type=int, metavar="S", help="tokens of a sequence, for MFU; the config's where left out"
    ),
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
        seq_len=args.seq_len if args.seq_len is not None else seq_len,
        tokens_per_step=args.tokens_per_step,
        device=args.device,
        against=args.against,
        workers=args.workers,
        keep_truncated=args.keep_truncated,
        max_bytes=args.max_bytes,
    )
    print(text)
