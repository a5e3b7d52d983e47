"""The one table of what is not supported: each entry fires, alone and in one line, and nobody refuses elsewhere."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from trainsys.errors import UserError
from trainsys.layout import Layout
from trainsys.layout.refused import TABLE, Refusal, problems
from trainsys.layout.refused.page import case_of, page, run_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_run_that_examples_change_is_fine() -> None:
    assert list(problems(case_of({}))) == []


@pytest.mark.parametrize("refusal", TABLE, ids=lambda r: r.name)
def test_it_fires_on_its_example_alone_and_in_one_line(refusal: Refusal) -> None:
    case = case_of(refusal.example)
    (said,) = problems(case)
    assert said == refusal.says(case)
    assert "\n" not in said
    run = run_of(refusal.example)
    with pytest.raises(UserError) as caught:
        case.layout.validate(run.model, run.train, run.parallel, recompute=run.recompute)
    assert str(caught.value) == said


def test_names_are_unique() -> None:
    assert [name for name, n in Counter(r.name for r in TABLE).items() if n > 1] == []


def test_the_page_is_of_this_table() -> None:
    said = (ROOT / "docs/refusals.md").read_text(encoding="utf-8")
    assert said == page(), "python -m trainsys.layout.refused.page > docs/refusals.md"


# Sizes that no world can serve, which are no combination; and the walk over the table itself.
MAY_REFUSE = {"layout/axes.py", "layout/resolve.py", "schedules/build.py"}


def test_nobody_else_refuses_combinations() -> None:
    found = []
    for room in ("layout", "context", "schedules", "parallel", "memory", "comm", "ops", "optim"):
        for file in sorted((ROOT / "trainsys" / room).rglob("*.py")):
            name = file.relative_to(ROOT / "trainsys").as_posix()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    raised = ast.unparse(node.exc.func)
                    if raised in ("UserError", "ValueError") and name not in MAY_REFUSE:
                        found.append(f"{name}:{node.lineno}: {raised}")
    assert found == [], "put it into trainsys/layout/refused"


def test_without_recomputation_said_nothing_of_it_is_refused() -> None:
    run = run_of({"recompute.stream_ffn": 8, "parallel.pp": 2, "parallel.pipeline.schedule": "zbv"})
    layout = Layout.resolve(run.parallel, 2)
    assert layout.validate(run.model, run.train, run.parallel) == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"parallel.shard.optim": "over_replicas"}, "parallel.dp_replicate=1: there are no replicas"),
        ({"parallel.overlap.tensor": True}, "parallel.tp=1: there is no tensor parallelism"),
    ],
)
def test_what_has_no_axis_to_act_on_is_warned_of(setting: dict[str, object], says: str) -> None:
    """Not refused: an elastic run may lose the axis."""
    run = run_of(setting)
    (warning,) = Layout().validate(run.model, run.train, run.parallel)
    assert says in warning
