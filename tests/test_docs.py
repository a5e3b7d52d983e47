"""What the pages say to type, to open and to set exists: commands, options, files, links, config keys."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from trainsys import cli
from trainsys.config.schema import json_schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = ("trainsys/", "configs/", "launchers/", "tests/", "profiling/", "docs/", ".ci/")
# Words of a page that stand for something of the reader's.
STANDS_FOR = re.compile(r"[…<>*{}$]|\.\.\.|[A-Z]{3}")


def spans(page: Path) -> list[str]:
    """Every piece of code of a page: lines of fenced blocks, and spans between backticks."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.split("  #")[0].strip() for block in fenced for line in block.splitlines()]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", plain)]


def commands(page: Path) -> list[list[str]]:
    """Arguments after ``trainsys`` of every command line on a page."""
    found = []
    for span in spans(page):
        match = re.match(r"(?:[A-Z_]+=\S+ )*(?:torchrun .*-m |python -m |\.venv/bin/)?trainsys (.+)", span)
        if match:
            words = shlex.split(match.group(1).split(" | ")[0].split(" > ")[0], comments=True)
            found.append([w for w in words if w not in ("…", "...")])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_are_those_of_the_command_line(page: Path) -> None:
    for words in commands(page):
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in cli.COMMANDS), None)
        groups = {n.split()[0] for n in cli.COMMANDS if " " in n}
        if name is None:
            # A group, with its members or none: `trainsys ckpt ls|inspect`.
            assert words[0] in groups or words[0].startswith("-"), f"{page.name}: trainsys {' '.join(words)}"
            continue
        known = {option for names, _ in cli.COMMANDS[name][2] for option in names} | {"--help"}
        for word in words:
            option = word.split("=")[0]
            if option.startswith("--"):
                assert option in known, f"{page.name}: trainsys {name} has no {option}"


def leaf(schema: dict[str, Any], path: str) -> bool:
    """Whether ``section.key`` is a field of a run's config."""
    node = schema
    for part in path.split("."):
        options = [node, *node.get("anyOf", [])]
        options = [schema["$defs"][o["$ref"].rsplit("/", 1)[1]] if "$ref" in o else o for o in options]
        inner = [o["properties"][part] for o in options if part in o.get("properties", {})]
        if not inner:
            return any(isinstance(o.get("additionalProperties"), dict) for o in options)
        node = inner[0]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_exist(page: Path) -> None:
    schema = json_schema()
    sections = {name for name, p in schema["properties"].items() if "$ref" in str(p)}
    for span in spans(page):
        for word in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z0-9_]+)+)(?=[=:\s,;)]|$)", span):
            if word.split(".")[0] in sections and not word.endswith(
                (".py", ".md", ".yaml", ".html", ".json")
            ):
                assert leaf(schema, word), f"{page.name}: there is no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: link to {link}"
    for span in spans(page):
        for word in re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]+", span):
            path = word.rstrip(".,:")
            if path.startswith(PLACES) and not STANDS_FOR.search(path.replace("README.md", "")):
                assert (ROOT / path).exists(), f"{page.name}: names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for file, name in re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        path = ROOT / "tests" / file
        if not path.is_file() or f"def {name}(" not in path.read_text(encoding="utf-8"):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_every_fault_names_the_test_that_shows_it() -> None:
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"\.py::\w+` \|$", row)] == []
