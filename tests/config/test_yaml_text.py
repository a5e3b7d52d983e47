from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.config.text import dump, parse_document, parse_scalar
from trainsys.errors import UserError

SCALARS = [
    ("1e-4", 1e-4), ("3E8", 3e8), ("1.", 1.0), (".5", 0.5), ("-2.5e+3", -2500.0), (".inf", math.inf),
    ("1_000_000", 1_000_000), ("0x1F", 31), ("0o17", 15), ("017", 17), ("+3", 3),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"),
    ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e4", "e4"), ("-", "-"), ("=", "="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read, _ = parse_document(f"key: {text}" if text != "-" else "key: '-'", "f")
    for found in (read["key"], parse_scalar(text, "f")):
        assert found == value
        assert type(found) is type(value)


def test_quoted_is_text_and_tags_are_obeyed() -> None:
    read, _ = parse_document("a: '1'\nb: \"null\"\nc: !!str 5\nd: !!float 5\ne: |\n  12\n", "f")
    assert read == {"a": "1", "b": "null", "c": "5", "d": 5.0, "e": "12\n"}
    assert isinstance(read["d"], float)


def test_every_path_knows_its_line() -> None:
    _, origins = parse_document("a:\n  b: 1\n  c: [x,\n    y]\nd: {e: 2}\n", "f.yaml")
    assert origins["a", "b"] == "f.yaml:2"
    assert origins["a", "c"] == "f.yaml:3"
    assert origins["a", "c", 1] == "f.yaml:4"
    assert origins["d", "e"] == "f.yaml:5"


def test_aliases_are_values() -> None:
    read, _ = parse_document("a: &x {b: 1}\nc: *x\n", "f")
    assert read == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", r"^f:3: key a is already given on line 1$"),
        ("s:\n  a: 1\n  a: 1", r"^f:3: key s.a is already given on line 2$"),
        ("a: [", r"^f:\d: not valid YAML"),
        ("\tx: 1", r"^f:1: not valid YAML"),
        ("a: 1\n---\nb: 2", r"^f:2: not valid YAML"),
        ("a: \x00", r"^f: not valid YAML"),
        ("? [1]\n: 2", r"^f:1: a key must be a word"),
        ("&a [*a]", r"^f:1: an alias refers to what it is part of"),
        ("a: !!python/object/apply:os.system ['true']", r"^f:1: tag .* is not supported"),
        ("a: !secret x", r"^f:1: tag .* is not supported"),
        ("a: !!int x", r"^f:1: 'x' is no int"),
        ("[" * 5000, r"^f(:\d+)?: (not valid YAML|nested too deeply)"),
        ("a: " + "[" * 3000 + "]" * 3000, r"^f(:\d+)?: (not valid YAML|nested too deeply)"),
    ],
)
def test_bad_text_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse_document(text, "f")
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    message = ""
    try:
        parse_document(text, "f")
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
    | st.sampled_from([text for text, _ in SCALARS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=6), plain, max_size=4))
def test_dump_reads_back(values: dict[str, Any]) -> None:
    read, _ = parse_document(dump(values), "f")
    assert read == values
    assert repr(read) == repr(values)  # 1 is not True, 1.0 is not 1


def test_dump_is_safe_for_readers_of_yaml_1_1() -> None:
    values = {"mode": "off", "n": "1e5", "t": "12:30", "on": 1}
    assert yaml.safe_load(dump(values)) == values
