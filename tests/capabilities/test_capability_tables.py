"""The tables of what engines can't run: each entry fires on its example, alone, in one line; the page is theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainsys.capabilities import LIMITS, refuse_unable, unable
from trainsys.capabilities.base import Limit
from trainsys.capabilities.page import page
from trainsys.config.run import RunConfig
from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.layout.refused.page import run_of

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [(engine, limit) for engine, limits in LIMITS.items() for limit in limits]


def case(engine: str, example: object) -> tuple[RunConfig, Layout]:
    cfg = run_of({**dict(example), "engine": engine})  # type: ignore[call-overload]
    world = Layout.required_world(cfg.parallel)
    assert world is not None
    return cfg, Layout.resolve(cfg.parallel, world)


@pytest.mark.parametrize("engine", LIMITS)
def test_the_run_that_examples_change_is_fine(engine: str) -> None:
    assert unable(*case(engine, {})) == []


@pytest.mark.parametrize(("engine", "limit"), ENTRIES, ids=[f"{e}: {limit.what}" for e, limit in ENTRIES])
def test_it_fires_on_its_example_alone_and_in_one_line(engine: str, limit: Limit) -> None:
    cfg, layout = case(engine, limit.example)
    assert unable(cfg, layout) == [f"engine={engine}: {limit.what}: {limit.reason}"]
    with pytest.raises(UserError) as told:
        refuse_unable(cfg, layout)
    assert "\n" not in str(told.value)
    assert unable(*case("native", limit.example)) == []


def test_the_page_is_the_tables() -> None:
    assert (ROOT / "docs" / "capabilities.md").read_text() == page(), (
        "python -m trainsys.capabilities.page > docs/capabilities.md"
    )


def test_asking_needs_no_engine_and_no_torch() -> None:
    code = (
        "import sys, trainsys.capabilities.page\n"
        "print([m for m in ('torch', 'megatron', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
