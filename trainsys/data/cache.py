"""Tokenize a text corpus once; every later process memory-maps the result.

The cache folder's name is a hash of (documents' fingerprint, tokenizer, shard format), so a hit is always
the right text. A builder works in a folder of its own and renames it into place, so a cache that exists is
whole. One process builds while the others wait on a file lock (``flock``): the kernel frees it when its
owner dies, so a lock cannot outlive a killed builder. Where the file system has no locks, several may
build; the first rename wins and the others drop theirs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from trainsys.data.documents import Documents
from trainsys.data.shards import FORMAT_VERSION, INDEX, ShardWriter
from trainsys.data.tokenizer import Tokenizer
from trainsys.errors import UserError

log = logging.getLogger(__name__)

Progress = Callable[[ShardWriter], None]
_POLL_S = 0.1
_SAY_AFTER_S = 2.0
_TOKENIZE_AT_ONCE = 256  # documents handed to the tokenizer together, so that it can use its threads


def default_cache_dir() -> Path:
    """``$TRAINSYS_CACHE``, else ``~/.cache/trainsys``."""
    return Path(os.environ.get("TRAINSYS_CACHE") or Path.home() / ".cache" / "trainsys")


def write_shards(
    documents: Documents, tokenizer: Tokenizer, writer: ShardWriter, progress: Progress | None
) -> None:
    """Every document through the tokenizer into ``writer``, which ``progress`` sees now and then."""
    texts = iter(documents)
    while group := list(islice(texts, _TOKENIZE_AT_ONCE)):
        for ids in tokenizer.encode_batch(group):
            writer.add(ids)
        if progress:
            progress(writer)
    if not writer.tokens:
        raise UserError(f"{documents.name}: no text in it; every document is empty")


def cached_tokens(
    documents: Documents, tokenizer: Tokenizer, cache_dir: str | None, progress: Progress | None = None
) -> Path:
    """Folder of token shards for ``documents``, built by this call if no process has built it before.

    Raises ``UserError`` when the text cannot be read or the cache folder cannot be written.
    """
    root = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "tokens"
    identity = f"{documents.fingerprint()}\0{tokenizer.fingerprint}\0{FORMAT_VERSION}"
    target = root / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if (target / INDEX).is_file():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_suffix(".lock")) as alone:
            if not (target / INDEX).is_file():
                _build(documents, tokenizer, target, progress, alone)
    except OSError as error:
        raise UserError(
            f"{error.filename or root}: cannot write the token cache ({error.strerror or error}); "
            "set data.cache_dir or TRAINSYS_CACHE to a folder with room"
        ) from error
    return target


def _build(
    documents: Documents, tokenizer: Tokenizer, target: Path, progress: Progress | None, alone: bool
) -> None:
    if alone:  # what a killed builder left; nobody else can be at work on this key
        for left in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
    work = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    work.mkdir()
    try:
        with ShardWriter(work, tokenizer) as writer:
            write_shards(documents, tokenizer, writer, progress)
        publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, target: Path) -> bool:
    """Rename a finished folder into place, durably; False, and no change, where another got there first."""
    try:
        work.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    return True


@contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """Hold the lock file; yields False where the file system has no locks. Waits say who holds it.

    The file stays: removing a lock that another process may be opening would let two in.
    """
    with open(path, "a+", encoding="utf-8") as file:
        began, said = time.monotonic(), False
        locked = True
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said and time.monotonic() - began > _SAY_AFTER_S:
                    file.seek(0)
                    log.warning(
                        "waiting for %s to tokenize (%s)", file.read().strip() or "another process", path
                    )
                    said = True
                time.sleep(_POLL_S)
            except OSError as error:
                log.warning(
                    "%s: no file locks here (%s): processes may tokenize the same text", path, error.strerror
                )
                locked = False
                break
        try:
            if locked:
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            yield locked
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)
