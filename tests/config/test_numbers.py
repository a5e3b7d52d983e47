"""Every number of a config at its extremes: the run works, or one line says what is wrong; never a traceback.

The whole, about an hour: ``launchers/test.sh tests/config/test_numbers.py -m slow``.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from trainsys.cli import main
from trainsys.config.loader import load_run
from trainsys.config.run import RunConfig
from trainsys.errors import EXIT_USER_ERROR, UserError
from trainsys.resilience.watchdog import EXIT_HUNG

RUN = """
name: n
hardware: H100-SXM-80
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
parallel: {dp_shard: 1}
train: {steps: 3, seq_len: 32, global_batch: 4, micro_batch: 2, device: cpu, dtype: fp32, threads: 1}
data: {source: synthetic}
telemetry: {console: "off"}
checkpoint: {every: 2}
"""
INTEGERS = ("0", "1", "3", "-1", "1000003", str(2**31), str(2**63 - 1), str(2**63), str(10**30))
FLOATS = ("0", "-1", "0.5", "2", "1e-300", "1e300", ".nan", ".inf", "1e18")


def numbers(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted key and the values to try, of every number in the schema."""
    for name, field in model.model_fields.items():
        kinds, plain = [field.annotation], []
        while kinds:
            kind: Any = kinds.pop()
            inner = () if get_origin(kind) is Literal else get_args(kind)
            kinds += inner
            plain += [] if inner else [kind]
        sections = [k for k in plain if isinstance(k, type) and issubclass(k, BaseModel)]
        for section in sections:
            yield from numbers(section, f"{prefix}{name}.")
        if not sections and (int in plain or float in plain):
            yield f"{prefix}{name}", FLOATS if float in plain else INTEGERS


CASES = [f"{key}={value}" for key, values in numbers() for value in values]
# Each of these ended in a traceback or a crash once.
ONCE_WRONG = [
    f"recompute.stream_ffn={2**63}", "train.threads=1000003", f"train.threads={2**31}", "model.n_layers=1000003",
    f"train.global_batch={10**30}",
]  # fmt: skip


def test_every_number_loads_or_is_refused_in_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    assert len(CASES) > 700
    loaded = refused = 0
    for case in CASES:
        try:
            load_run(str(file), [case])
            loaded += 1
        except UserError as caught:
            refused += case.partition("=")[0].rpartition(".")[2] in str(caught)
    assert loaded + refused == len(CASES), "a key is not named"
    assert min(loaded, refused) > 200


def trained(folder: Path, case: str) -> int | None:
    """Exit code of training with ``case``; None: it still ran after a while, as ``train.steps=1000003`` has to."""
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_AS, (7 << 30, 7 << 30))
            os.chdir(folder)
            out = os.open("log", os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            Path("run.yaml").write_text(RUN)
            code = main(["train", "run.yaml", case])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 99
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def check(tmp_path: Path, cases: list[str]) -> None:
    wrong = []
    for number, case in enumerate(cases):
        code = trained(tmp_path / str(number), case)
        said = (tmp_path / str(number) / "log").read_text()
        hung = EXIT_HUNG if case.startswith("resilience.hang_timeout_s") else 0  # a limit that a step is above
        if code not in (0, EXIT_USER_ERROR, None, hung) or "Traceback" in said:
            wrong.append((case, code, said[-300:]))
    assert not wrong


@pytest.mark.timeout(600)
def test_training_works_or_says_in_a_line_why_not(tmp_path: Path) -> None:
    check(tmp_path, ONCE_WRONG + random.Random(0).sample(CASES, 12))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_training_with_every_number_at_its_extremes(tmp_path: Path) -> None:
    check(tmp_path, CASES)
