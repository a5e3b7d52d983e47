"""Text at a width: numbers stay whole, different names stay different, nothing acts on the terminal."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainsys.terminal_text import PIPED, Table, clean, columns, layout, tell_apart

PIECES = ["void ", "at::native::", "gpu_kernel<", "Add", "Mul", "float", "128, 4", ">"]
PARTS = st.lists(st.sampled_from(PIECES), max_size=16)
ROW = st.tuples(PARTS.map("".join), st.integers(0, 10**9), st.integers(0, 10**6))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31mred\x1b[0m gemm", "red  gemm"),
        ("\x1b]0;owned\x07gemm", "gemm"),
        ("\x1b]8;;http://x\x1b\\gemm", "gemm"),
        ("a\x1b[2Jb\x9b1mc\nd", "a b 1mc d"),
        ("abc\u202egnp.exe", "abc gnp.exe"),
        ("plain · ü", "plain · ü"),
    ],
)
def test_escapes_and_control_characters_are_taken_out(text: str, seen: str) -> None:
    assert clean(text) == seen


def test_names_that_begin_alike_are_shown_where_they_differ() -> None:
    names = ["elementwise_kernel<128, 4, gpu_kernel_impl_nocast<" + n for n in ("MulFunctor>", "AddFunctor>", "copy>")]
    short = tell_apart(names, 36)
    assert all("elementwise" in s for s in short)
    for name, seen in zip(("MulFunctor", "AddFunctor", "copy"), short, strict=True):
        assert name in seen


# How long drawing takes says how busy the machine is.
UNHURRIED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@UNHURRIED
@given(st.lists(PARTS.map("".join), max_size=12), st.integers(16, 60))
def test_different_names_stay_different_in_any_width(names: list[str], width: int) -> None:
    short = tell_apart(names, width)
    assert all(len(s) <= width for s in short)
    assert len(set(short)) == len(set(names))
    assert all(s == n for s, n in zip(short, names, strict=True) if len(n) <= width)


@UNHURRIED
@given(st.lists(ROW, min_size=1, max_size=12), st.integers(60, 140))
def test_a_table_keeps_its_numbers_and_its_width(rows: list[tuple[str, int, int]], width: int) -> None:
    cells = [(name, f"{a:,}", f"{b / 1e3:.3f}") for name, a, b in rows]
    lines = Table(("kernel", "calls so far", "made others wait ms"), cells).lines(width)
    assert all(len(line) <= width for line in lines)
    for line, (_, a, b) in zip(lines[-len(cells) :], cells, strict=True):
        assert line.split()[-2:] == [a, b]


def test_a_path_keeps_its_end() -> None:
    rows = [("/very/long/folder/of/somebody/somewhere/train.py:123 forward", "1.25")]
    line = Table(("held by", "GiB"), rows, labels=(), tails=(0,)).lines(40)[-1]
    assert "train.py:123 forward" in line
    assert line.endswith("1.25")


def test_paragraphs_are_broken_at_the_width_and_hang_under_their_first_word() -> None:
    text = layout(["  why: " + "word " * 30], 40)
    assert max(map(len, text.splitlines())) <= 40
    assert all(line.startswith(" " * 7) for line in text.splitlines()[1:])
    assert len(layout(["  why: " + "word " * 30], None).splitlines()) == 1


def test_the_width_is_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "93")
    assert columns() == 93
    for nonsense in ("", "wide", "0", "-4"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert columns() is None
    assert max(map(len, Table(("a", "b"), [("x" * 400, "1")]).lines())) == PIPED
