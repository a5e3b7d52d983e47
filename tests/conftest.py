"""Set-up that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch: a forked worker must find no thread pool that only its parent has.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-table", type=Path, metavar="FILE", help="write the parity results of this session as a page"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--parity-table")
    if path is not None:
        from support.parity import table

        path.write_text(table())
