"""Reports as they are read: at 80 columns, piped, on a terminal; by eyes that confuse colours."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from support.made_run import Run
from trainsys import cli
from trainsys.layout import Layout
from trainsys.profiler.explain import explain
from trainsys.profiler.terminal import print_explanation
from trainsys.profiler.trace.kernel_names import short_names
from trainsys.profiler.trace.main import analyse, run
from trainsys.profiler.trace.text import render

NUMBER = re.compile(r"(?<![\w.#])\d[\d,]*\.?\d*%?(?![\w.])")
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::{}<float>, std::array<char*, 3ul>>(int)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    layout = Layout(pp=1, dp_replicate=1, dp_shard=4, cp=1, tp=1, ep=1)
    for rank in range(4):
        for _ in Run(layout, slow=2).record(folder, rank, range(30)):
            pass
    return folder


def kernels(path: Path, durations: dict[str, float]) -> Path:
    at, events = 1000.0, []
    for name, length in durations.items():
        event = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": at, "dur": length, "args": {}}
        events.append(event)
        at += length + 1
    path.write_text(json.dumps({"traceEvents": events, "distributedInfo": {"rank": 0, "world_size": 1}}))
    return path


# ---- widths --------------------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    return sorted(NUMBER.findall(text))


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_trace_piped_keeps_to_columns_and_keeps_its_numbers(
    slow_job: tuple[object, object, Path], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = run([slow_job[2]])
    assert max(map(len, text.splitlines())) <= width
    assert numbers(text) == numbers(render(analyse([slow_job[2]]), 400))
    monkeypatch.delenv("COLUMNS")
    why = [line for line in run([slow_job[2]]).splitlines() if line.startswith("     why: ")]
    assert why
    assert max(map(len, why)) > 80, "without a width paragraphs are one line, for grep"


@pytest.mark.parametrize("width", [80, 100])
def test_a_run_piped_keeps_to_columns_and_keeps_its_numbers(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    told = []
    for columns in (width, 110):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["explain", str(made)]) == 0
        told.append(capsys.readouterr().out)
    assert max(map(len, told[0].splitlines())) <= width
    assert numbers(told[0]) == numbers(told[1])


def on_a_terminal(made: Path, width: int) -> str:
    """What ``trainsys explain`` prints on a terminal of so many columns, without its colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, width, 0, 0))
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "trainsys", "explain", str(made)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    out = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # what reading a terminal that nobody holds open any more gives on Linux
            break
        if not piece:
            break
        out += piece
    os.close(ours)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[0-9;]*m|\r", "", out.decode())


def test_a_terminal_never_cuts_a_number(made: Path) -> None:
    narrow, tiny, wide = (on_a_terminal(made, width) for width in (80, 40, 160))
    assert numbers(narrow) == numbers(wide) == numbers(tiny)
    assert "…" not in narrow + tiny
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 80
    assert "█" in narrow


def test_terms_of_nothing_are_one_row_that_keeps_the_sum(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    e = explain(made)
    fall = e.waterfall
    assert fall is not None
    for i in (1, 2):
        fall.terms[i] = replace(fall.terms[i], seconds=0.0001 * fall.wall_s)
    whole = sum(t.seconds for t in fall.terms)
    e.waterfall = fall = replace(fall, wall_s=whole, step_s=whole)
    print_explanation(e)
    text = capsys.readouterr().out
    rows = re.findall(r"^  (\S.*?)  +([\d,.]+)  +([\d.]+)%", text[text.index("% of ") :], re.M)
    labels, milliseconds, shares = zip(*rows, strict=True)
    end = next(i for i, label in enumerate(labels) if label.startswith("step"))
    assert end == len(fall.terms) - 1  # two are one
    assert labels[end - 1] == "2 others"
    assert sum(map(float, shares[:end])) == pytest.approx(100)
    assert labels[end:] == ("step",)
    assert sum(map(float, milliseconds[:end])) == pytest.approx(float(milliseconds[-1]), abs=0.03)
    assert f"others: {fall.terms[1].label}, {fall.terms[2].label}" in text


# ---- colours -------------------------------------------------------------------------------------

# Linear RGB as seen without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
SEEN_BY = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear RGB to Oklab (Ottosson 2020).
TO_LMS = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
TO_LAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def linear(colour: str) -> np.ndarray:  # type: ignore[type-arg]
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def apart(a: str, b: str, eyes: str) -> float:
    labs = [TO_LAB @ np.cbrt(TO_LMS @ np.clip(SEEN_BY[eyes] @ linear(c), 0, 1)) for c in (a, b)]
    return float(np.linalg.norm(labs[0] - labs[1]))


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def variables(css: str) -> list[dict[str, str]]:
    """Colours by name, of the light theme and of the dark one."""
    return [dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root[^{]*\{([^}]*)\}", css)]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("file", "least", "names"),
    [
        ("assets/explain.css", 0.18, ("late", "stall", "gc")),
        ("assets/explain.css", 0.07, ("useful", "late", "stall", "gc", "c1", "opt")),
        ("trace/assets/page.css", 0.1, ("matmul", "other", "comm", "copy", "idle")),
    ],
)
def test_colours_differ_for_all_eyes(theme: int, file: str, least: float, names: tuple[str, ...]) -> None:
    colours = variables((resources.files("trainsys.profiler") / file).read_text())[theme]
    for eyes in SEEN_BY:
        # Tritanopia is one in ten thousand: told by the labels, held only for the three losses.
        if eyes == "tritanopia" and len(names) > 3:
            continue
        for a, b in combinations(names, 2):
            assert apart(colours[a], colours[b], eyes) >= least, (eyes, a, b)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_can_be_read(theme: int) -> None:
    own = variables((resources.files("trainsys.profiler") / "assets/explain.css").read_text())[theme]
    colours = variables((resources.files("trainsys.profiler") / "trace/assets/page.css").read_text())[theme] | own
    for word in ("ink", "soft", "good", "bad"):
        assert contrast(colours[word], colours["card"]) >= 4.5, word
    for shape in ("late", "stall", "useful", "opt"):
        assert contrast(colours[shape], colours["card"]) >= 3, shape


# ---- names ---------------------------------------------------------------------------------------


def test_kernels_are_told_apart_where_they_differ(tmp_path: Path) -> None:
    functors = ["MulFunctor", "AddFunctor", "DivFunctor", "CopyFunctor"]
    path = kernels(tmp_path / "a.json", {ELEMENTWISE.format(f): 100 - i for i, f in enumerate(functors)})
    text = render(analyse([path]), 80)
    for functor in functors:
        assert len(re.findall(rf"{functor}.*other compute +1 ", text)) == 1, text


def test_a_kernels_short_name_is_never_that_of_another() -> None:
    names = ["void a::k<1>(int)", "void b::k<1>(int)", "void a::k<1>(float)", "_ZN2at6native3addEv", "x::y::z(T*)::w()"]
    short = short_names(names, 60)
    assert len(set(short)) == len(names)
    assert short[3] == "add"
    assert short[4] == "z(T*)::w"


def test_what_is_left_of_the_kernels_is_one_row(tmp_path: Path) -> None:
    long = {f"big_{i}": 1000.0 for i in range(3)}
    path = kernels(tmp_path / "a.json", long | {f"small_{i}": 0.01 for i in range(30)})
    text = render(analyse([path]), 80)
    rows = text[text.index("Kernels of rank") :].splitlines()[2:]
    assert [row.split()[0] for row in rows[:4]] == ["big_0", "big_1", "big_2", "and"]
    assert "and 30 more" in rows[3]
    assert sum(float(row.split()[-1][:-1]) for row in rows[:4]) == pytest.approx(100, abs=0.2)


def test_nothing_in_a_trace_reaches_the_terminal_as_an_escape(tmp_path: Path) -> None:
    path = kernels(tmp_path / "rank0\x1b[31m.json", {"\x1b]0;owned\x07gemm": 10.0})
    told = json.loads(path.read_text())
    told["deviceProperties"] = [{"id": 0, "name": "H100\x1b[2J", "totalGlobalMem": 1}]
    path.write_text(json.dumps(told))
    (tmp_path / "bad\x1b[5m.json").write_text("{")
    text = render(analyse([tmp_path]), 80)
    assert "H100" in text
    assert "not read" in text
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
