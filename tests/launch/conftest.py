"""A Slurm for the tests of this folder, started once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.slurm import CLUSTER, RUN


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    folder = tmp_path_factory.mktemp("slurm")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    patch.setenv("SLURM_TEST_PORT", str(21000 + os.getpid() % 500 * 10))

    def call(action: str, *arguments: str) -> None:
        subprocess.run([str(CLUSTER), action, str(folder), *arguments], check=True, timeout=60)

    try:
        call("up", "3")
        yield call
    finally:
        call("down")
        patch.undo()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    lines = (f"{n} and {n + 1} make {2 * n + 1}" for n in range(3000))
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path
