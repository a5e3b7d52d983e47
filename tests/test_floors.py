"""Imports go downward only, and the lower floors never import torch: DESIGN.md, "The house"."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trainsys"

# From the ground up. A package imports from its own floor and from those below it. Whoever adds a package
# to trainsys gives it a floor here.
FLOORS = (
    {
        "errors", "failure", "blame", "threads", "rank_lists", "terminal_text",
        "shipped_yaml", "layout", "context", "flops", "hardware", "config", "schedules", "capabilities",
    },
    {"telemetry", "profiler", "planner", "launch", "sweep"},
    {"parallel", "memory", "optim", "data", "ops", "models", "comm"},
    {"train", "engines", "resilience", "checkpoint", "bench", "dryrun"},
    {"cli", "__main__"},
)
TORCH_FREE = FLOORS[0] | FLOORS[1]
# Takes a trace of the running process, so it needs the torch that runs in it.
NEEDS_TORCH = {"trainsys.profiler.capture"}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The package or module right under trainsys; empty for trainsys itself."""
    return module.split(".")[1] if "." in module else ""


@cache
def imports_of(file: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, at the top and inside functions."""
    found = []
    here = module_of(file).split(".")
    if file.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            found.append((node.lineno, target))
            # `from trainsys import layout` imports a module too.
            found += [(node.lineno, f"{target}.{alias.name}") for alias in node.names if target == "trainsys"]
    return found


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def rooms_imported(file: Path) -> Iterator[tuple[int, str]]:
    for line, target in imports_of(file):
        room = room_of(target)
        if target.startswith("trainsys.") and (
            (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
        ):
            yield line, room


def test_every_package_has_a_floor() -> None:
    rooms = {room_of(module_of(file)) for file in FILES} - {""}
    assert rooms <= set().union(*FLOORS), "give the new package a floor in tests/test_floors.py"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_downward(file: Path) -> None:
    room = room_of(module_of(file))
    if not room:
        assert list(rooms_imported(file)) == [], "trainsys/__init__.py is imported by every floor"
        return
    upward = [
        f"line {line}: {room} imports {other}, a floor above"
        for line, other in rooms_imported(file)
        if floor_of(other) > floor_of(room)
    ]
    assert upward == []


def test_packages_of_one_floor_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        room = room_of(module_of(file))
        graph.setdefault(room, set()).update(other for _, other in rooms_imported(file) if other != room)
    while free := {room for room, needs in graph.items() if not needs & graph.keys()}:
        for room in free:
            del graph[room]
    assert graph == {}, "these import each other"


@pytest.mark.parametrize(
    "file", [f for f in FILES if room_of(module_of(f)) in TORCH_FREE | {"cli", ""}], ids=module_of
)
def test_the_lower_floors_do_not_name_torch(file: Path) -> None:
    if module_of(file) in NEEDS_TORCH:
        pytest.skip("needs torch by its purpose")
    named = [(line, target) for line, target in imports_of(file) if target.split(".")[0] == "torch"]
    assert named == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_lower_floors_leaves_torch_out() -> None:
    modules = [
        module_of(file)
        for file in FILES
        if room_of(module_of(file)) in TORCH_FREE and module_of(file) not in NEEDS_TORCH
    ]
    assert len(modules) > 20
    code = (
        f"import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    run_python(code)


@pytest.mark.parametrize(
    ("command", "never"),
    [
        (["--help"], ["torch", "numpy", "pydantic", "yaml", "rich"]),
        (["launch", "--help"], ["torch", "numpy", "pydantic", "yaml", "rich"]),
        (["config", "show", "train/demo"], ["torch", "numpy", "rich"]),
        (["config", "schema"], ["torch", "numpy", "rich"]),
        (["launch", "train/demo", "--on", "local", "--dry-run"], ["torch", "numpy", "rich"]),
    ],
    ids=" ".join,
)
def test_light_commands_import_little(command: list[str], never: list[str]) -> None:
    code = (
        "import sys\n"
        "from trainsys.cli import main\n"
        "try:\n"
        f"    code = main({command!r})\n"
        "except SystemExit as left:\n"
        "    code = left.code\n"
        f"print('LOADED', code, [name for name in {never!r} if name in sys.modules])\n"
    )
    assert run_python(code).splitlines()[-1] == "LOADED 0 []"
