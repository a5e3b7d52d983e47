"""Reports as they are read: at 80 columns, piped, on a terminal; by eyes that confuse colours; kernels with long names."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from support.made_run import Run
from trainsys import cli
from trainsys.layout import Layout
from trainsys.profiler.explain import explain
from trainsys.profiler.terminal import print_explanation
from trainsys.profiler.trace.kernel_names import short_names
from trainsys.profiler.trace.main import analyse, run
from trainsys.profiler.trace.text import render
from trainsys.telemetry.report import print_report

NUMBER = re.compile(r"(?<![\w.#])\d[\d,]*\.?\d*%?(?![\w.])")
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::{}<float>, std::array<char*, 3ul>>(int, float)"


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
        events.append({"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": at, "dur": length, "args": {}})
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


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_terminal_never_cuts_a_number(made: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)

    def shown(columns: int) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=columns, highlight=False, color_system=None)
        print_report(made, console)
        print_explanation(explain(made), console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    text = shown(width)
    assert "…" not in text
    assert numbers(text) == numbers(shown(160))
    if width >= 80:
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_terms_of_nothing_are_one_row_that_keeps_the_sum(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    e = explain(made)
    fall = e.waterfall
    assert fall is not None
    for i in (1, 2):
        fall.terms[i] = replace(fall.terms[i], seconds=0.0001 * fall.wall_s)
    e.waterfall = fall = replace(fall, wall_s=sum(t.seconds for t in fall.terms))
    print_explanation(e)
    text = capsys.readouterr().out
    rows = re.findall(r"^  (\S.*?)  +([\d,.]+)  +([\d.]+)%", text[text.index("% of step") :], re.M)
    labels, milliseconds, shares = zip(*rows, strict=True)
    end = labels.index("step and stalls")
    assert end == len(fall.terms) - 1  # two are one
    assert labels[end - 1] == "2 others"
    assert sum(map(float, shares[:end])) == pytest.approx(100)
    assert sum(map(float, milliseconds[:end])) == pytest.approx(float(milliseconds[end]), abs=0.03)
    assert f"others: {fall.terms[1].label}, {fall.terms[2].label}" in text


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
