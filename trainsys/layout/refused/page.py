"""docs/refusals.md from the table: ``python -m trainsys.layout.refused.page > docs/refusals.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainsys.config.run import RunConfig
from trainsys.config.text import in_code
from trainsys.layout.axes import Layout
from trainsys.layout.refused import SECTIONS, Case, Refusal

BASE: dict[str, Any] = {
    "model": {"n_layers": 12, "d_model": 96, "n_heads": 12, "n_kv_heads": 4, "d_ff": 256, "vocab": 320},
    "train": {"seq_len": 96, "global_batch": 24},
    "parallel": {"dp_shard": 1},
}
"""The run that examples change."""


def run_of(example: Mapping[str, object]) -> RunConfig:
    """`BASE` with the settings of an example."""
    tree: dict[str, Any] = {section: dict(values) for section, values in BASE.items()}
    for dotted, value in example.items():
        *path, last = dotted.split(".")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = value
    return RunConfig.model_validate(tree)


def case_of(example: Mapping[str, object]) -> Case:
    run = run_of(example)
    world = Layout.required_world(run.parallel)
    assert world is not None
    layout = Layout.resolve(run.parallel, world)
    return Case(layout, run.model, run.train, run.parallel, run.recompute)


def page() -> str:
    lines = [
        "# What is refused",
        "",
        "Every combination that is not supported, and what the user is told. `Layout.validate` walks this table before",
        "anything starts; `tests/layout` shows that each entry fires. From the table in `trainsys/layout/refused`, by",
        "`python -m trainsys.layout.refused.page > docs/refusals.md`.",
    ]
    for section, table in SECTIONS.items():
        lines += ["", f"## {section}", "", "| refused | for example | says |", "|---|---|---|"]
        lines += [_row(refusal) for refusal in table]
    return "\n".join(lines) + "\n"


def _row(refusal: Refusal) -> str:
    told = in_code({name.removeprefix("parallel."): value for name, value in refusal.example.items()})
    return f"| {refusal.name} | {told} | {refusal.says(case_of(refusal.example))} |"


if __name__ == "__main__":
    print(page(), end="")
