"""Checkpoints."""

from __future__ import annotations

import argparse
import sys

from trainsys.cli.registry import arg, command

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
    "rewrite a checkpoint with whole tensors, or for torch.distributed.checkpoint or DeepSpeed",
    CKPT,
    arg("output", metavar="OUT", help="new folder"),
    arg("--to", choices=["whole", "dcp", "deepspeed-universal"], default="whole"),
    arg("--weights-only", action="store_true", help="leave the optimizer's moments out"),
)
def _ckpt_convert(args: argparse.Namespace) -> None:
    if args.to == "deepspeed-universal":
        from pathlib import Path

        from trainsys.checkpoint.deepspeed_universal import export
        from trainsys.checkpoint.inspect import resolve

        print(export(resolve(args.checkpoint), Path(args.output), weights_only=args.weights_only))
        return
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
    "make a Hugging Face folder, or DeepSpeed's universal checkpoint, the first checkpoint of a new run",
    arg("source", metavar="DIR"),
    arg("folder", metavar="FOLDER", help="the run's checkpoint folder, which must be new"),
)
def _ckpt_import(args: argparse.Namespace) -> None:
    from pathlib import Path

    from trainsys.checkpoint.deepspeed_universal import import_ as import_universal
    from trainsys.checkpoint.deepspeed_universal import is_one
    from trainsys.checkpoint.hf import import_

    source, folder = Path(args.source), Path(args.folder)
    if is_one(source):
        print(import_universal(source, folder))
    else:
        print(import_(source, folder, say=lambda text: print(text, file=sys.stderr)))
