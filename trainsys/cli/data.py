"""Data."""

from __future__ import annotations

import argparse

from trainsys.cli.registry import arg, command


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
