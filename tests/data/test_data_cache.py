from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainsys.data import cache
from trainsys.data.cache import cached_tokens, default_cache_dir
from trainsys.data.shards import list_shards, open_shards
from trainsys.data.source import build_source
from trainsys.data.tokenizer import ByteTokenizer
from trainsys.errors import UserError

fork = multiprocessing.get_context("fork")


class Notes:
    """Documents that leave a mark in ``log`` each time they are read, slowly enough for others to arrive."""

    name = "notes"
    record: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def __init__(self, log: Path, texts: tuple[str, ...] = ("one", "two"), delay_s: float = 0.0) -> None:
        self._log, self._texts, self._delay_s = log, texts, delay_s

    def fingerprint(self) -> str:
        return repr(self._texts)

    def __iter__(self) -> Iterator[str]:
        with open(self._log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self._delay_s)
        yield from self._texts

    def reads(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


def tokens(folder: Path) -> list[int]:
    return [t for shard in open_shards(list_shards(folder)) for t in shard.tokens.tolist()]


def test_built_once_then_mapped(tmp_path: Path) -> None:
    documents = Notes(tmp_path / "log")
    first = cached_tokens(documents, ByteTokenizer(), str(tmp_path / "c"))
    assert cached_tokens(documents, ByteTokenizer(), str(tmp_path / "c")) == first
    assert documents.reads() == 1
    assert tokens(first) == [*b"one", 257, *b"two", 257]


def test_key_holds_text_tokenizer_and_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ByteTokenizer):
        fingerprint = "other"

    def key(texts: tuple[str, ...] = ("one",), tokenizer: ByteTokenizer | None = None) -> Path:
        return cached_tokens(
            Notes(tmp_path / "log", texts), tokenizer or ByteTokenizer(), str(tmp_path / "c")
        )

    keys = {key(), key(("other",)), key(tokenizer=Other())}
    monkeypatch.setattr(cache, "FORMAT_VERSION", 99)
    assert len(keys | {key()}) == 4


def test_four_processes_at_once_build_once(tmp_path: Path) -> None:
    documents = Notes(tmp_path / "log", delay_s=0.3)
    barrier = fork.Barrier(4)
    results = fork.SimpleQueue()

    def body() -> None:
        barrier.wait(20)
        results.put(tokens(cached_tokens(documents, ByteTokenizer(), str(tmp_path / "c"))))

    workers = [fork.Process(target=body) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [results.get() for _ in workers] == [[*b"one", 257, *b"two", 257]] * 4
    assert documents.reads() == 1


@pytest.mark.timing
def test_killed_builder_holds_nobody_up(tmp_path: Path) -> None:
    """Its lock goes with it, its unfinished folder is not taken for a cache, and the next builder removes
    it."""
    victim = fork.Process(
        target=cached_tokens, args=(Notes(tmp_path / "log", delay_s=60), ByteTokenizer(), str(tmp_path / "c"))
    )
    victim.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list((tmp_path / "c" / "tokens").glob("*.tmp-*"))
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(20)
    documents = Notes(tmp_path / "log")
    assert tokens(cached_tokens(documents, ByteTokenizer(), str(tmp_path / "c")))
    assert documents.reads() == 2
    assert not list((tmp_path / "c" / "tokens").glob("*.tmp-*"))


@pytest.mark.timing
def test_waiting_says_who_is_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "_SAY_AFTER_S", 0.0)
    builder = fork.Process(
        target=cached_tokens,
        args=(Notes(tmp_path / "log", delay_s=0.7), ByteTokenizer(), str(tmp_path / "c")),
    )
    builder.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with caplog.at_level(logging.WARNING):
        cached_tokens(Notes(tmp_path / "log"), ByteTokenizer(), str(tmp_path / "c"))
    builder.join(20)
    assert f"waiting for pid {builder.pid} on " in caplog.text


def test_without_file_locks_the_first_rename_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)

    class Rival(Notes):
        """Another process finishes the same cache while this one is reading."""

        def __iter__(self) -> Iterator[str]:
            cached_tokens(Notes(tmp_path / "log", self._texts), ByteTokenizer(), str(tmp_path / "c"))
            yield from self._texts

    folder = cached_tokens(Rival(tmp_path / "log"), ByteTokenizer(), str(tmp_path / "c"))
    assert tokens(folder) == [*b"one", 257, *b"two", 257]
    assert not list(folder.parent.glob("*.tmp-*"))


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    for texts in ((), ("", "")):
        with pytest.raises(UserError, match="notes: no text in it"):
            cached_tokens(Notes(tmp_path / "log", texts), ByteTokenizer(), str(tmp_path / "c"))
    assert not [p for p in (tmp_path / "c" / "tokens").iterdir() if p.suffix != ".lock"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write the token cache .*; set data\.cache_dir"):
        cached_tokens(Notes(tmp_path / "log"), ByteTokenizer(), str(tmp_path / "file"))


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRAINSYS_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("TRAINSYS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "trainsys"


def test_damaged_cache_says_how_to_mend_it(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("some text that is long enough for a row of tokens")
    cfg = make_config(source="text", path=str(tmp_path), cache_dir=str(tmp_path / "c"))
    build_source(cfg)
    (shard,) = (tmp_path / "c" / "tokens").glob("*/*.tok")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"truncated: .*it is a cache: delete {shard.parent}"):
        build_source(cfg)


def test_cache_appears_by_one_rename(tmp_path: Path) -> None:
    """The very folder that was written becomes the cache: copied files could be seen half there."""
    seen: list[int] = []

    class Watched(Notes):
        def __iter__(self) -> Iterator[str]:
            (work,) = (tmp_path / "c" / "tokens").glob("*.tmp-*")
            seen.append(work.stat().st_ino)
            yield from super().__iter__()

    folder = cached_tokens(Watched(tmp_path / "log"), ByteTokenizer(), str(tmp_path / "c"))
    assert seen == [folder.stat().st_ino]
