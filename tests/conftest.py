"""Set-up that every test shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch: a forked worker must find no thread pool that only its parent has.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-table", type=Path, metavar="FILE", help="write the parity results of this session as a page"
    )


@pytest.fixture(autouse=True)
def no_pool_of_threads() -> Iterator[None]:
    """OpenMP's threads are not there in a forked rank, whose first parallel loop would wait for them for ever."""
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    ours, set_num_threads = os.getpid(), torch.set_num_threads

    def only_in_forked_ranks(threads: int) -> None:
        assert threads == 1 or os.getpid() != ours, f"{threads} threads in pytest's own process: use support.apart"
        set_num_threads(threads)

    # Not the fixture `monkeypatch`: what a test sets by that is taken back before other fixtures end, and so only if none
    # of these asked for it first.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", only_in_forked_ranks)
        yield


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A rank forked later would find it: groups belong to forked ranks, never to the process of pytest."""
    yield
    if (dist := sys.modules.get("torch.distributed")) and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("left a process group in pytest's own process")


@pytest.fixture(autouse=True, scope="module")
def no_ranks_idle() -> Iterator[None]:
    """A module's ranks end with it: the groups that its tests made would poll beside all later tests."""
    yield
    if ranks := sys.modules.get("support.ranks"):
        ranks.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--parity-table")
    if path is not None:
        from support.parity import table

        path.write_text(table())
