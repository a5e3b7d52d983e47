"""``trainsys data prepare`` and ``verify``: token shards made by hand instead of cached on first use."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trainsys.config.run import DataConfig
from trainsys.data.cache import publish, write_shards
from trainsys.data.documents import find_files, open_documents
from trainsys.data.shards import SUFFIX, Shard, ShardWriter, list_shards, open_shards, shard_fingerprint
from trainsys.data.tokenizer import load_tokenizer
from trainsys.errors import UserError

TextSource = Literal["stdlib", "text", "jsonl", "parquet", "hf"]
_SOURCE_OF: dict[str, TextSource] = {".txt": "text", ".jsonl": "jsonl", ".gz": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Summary:
    """What a set of shards holds; ``bytes`` is the size of the shard files on disk."""

    path: Path
    shards: int
    documents: int
    tokens: int
    bytes: int
    fingerprint: str

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes:,} bytes "
            f"in {self.shards} shard{'s' * (self.shards != 1)}, fingerprint {self.fingerprint[:16]}"
        )


def prepare(
    input: str | None,
    output: str,
    *,
    tokenizer: str = "bytes",
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
    source: TextSource | None = None,
    split: str = "train",
) -> Summary:
    """Tokenize ``input`` into a new folder ``output`` of shards, and print a summary.

    The folder appears whole or not at all: it is written beside ``output`` and renamed. ``source`` None is
    told from the file's suffix. Raises ``UserError`` when the input cannot be read or ``output`` already
    holds something.
    """
    target = Path(output).expanduser()
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens}: give the tokens of one shard, such as 100000000")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{output}: already exists and is not an empty folder; name a new one")
    kind = source or _guess_source(input)
    if (input is None) != (kind == "stdlib"):
        raise UserError(
            f"input={input} with source={kind}: stdlib takes no input, every other source needs one"
        )
    documents = open_documents(
        DataConfig(source=kind, path=input, split=split, text_key=text_key, tokenizer=tokenizer)
    )
    encoder = load_tokenizer(tokenizer)
    work = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        work.mkdir(parents=True)
        with ShardWriter(work, encoder, shard_tokens) as writer, _progress() as bar:
            task = bar.add_task("tokenizing", total=None, documents=0, tokens=0)
            write_shards(
                documents, encoder, writer, lambda w: bar.update(task, documents=w.documents, tokens=w.tokens)
            )
        if not publish(work, target):
            raise UserError(f"{output}: another process wrote this folder meanwhile; name a new one")
    except OSError as error:
        raise UserError(
            f"{error.filename or output}: cannot write shards: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    summary = _summarize(target, open_shards(list_shards(target)))
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)
    return summary


def verify(path: str) -> Summary:
    """Read the shards at ``path`` (folder, file, glob) whole; ``UserError`` names the first damage."""
    where = Path(path).expanduser()
    paths = list_shards(where) if where.is_dir() else find_files(path, (SUFFIX,))
    if not paths:
        raise UserError(f"{path}: no *{SUFFIX} in this folder")
    shards = open_shards(paths)
    for shard in shards:
        shard.verify()
    return _summarize(where, shards)


def _summarize(path: Path, shards: list[Shard]) -> Summary:
    return Summary(
        path=path,
        shards=len(shards),
        documents=sum(len(s.doc_offsets) - 1 for s in shards),
        tokens=sum(len(s.tokens) for s in shards),
        bytes=sum(s.path.stat().st_size for s in shards),
        fingerprint=shard_fingerprint(shards),
    )


def _guess_source(input: str | None) -> TextSource:
    if input is None:
        return "stdlib"
    guess = _SOURCE_OF.get(Path(input).suffix)
    if guess is None:
        raise UserError(
            f"{input}: cannot tell the source from the name; give source text, jsonl, parquet or hf"
        )
    return guess


def _progress() -> Progress:
    """On stderr, so that the summary alone is the output; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn(
            "{task.description}: {task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"
        ),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
