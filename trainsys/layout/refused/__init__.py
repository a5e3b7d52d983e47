"""Every combination that is not supported, in one table: what, why, and what would work.

`Layout.validate` walks `TABLE`; docs/refusals.md is made from it (``python -m trainsys.layout.refused.page``). Whatever
fields alone can tell (a size of 0, a name that does not exist, two settings of one section) the config refuses
before, and sizes that no world can serve `Layout.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainsys.layout.refused import batch, context, memory, model, overlap, pipeline, sharding
from trainsys.layout.refused.case import Case, Refusal

SECTIONS: dict[str, tuple[Refusal, ...]] = {
    "Model": model.TABLE,
    "Context parallelism": context.TABLE,
    "Pipeline": pipeline.TABLE,
    "Sequence and batch": batch.TABLE,
    "Sharding of gradients and optimizer": sharding.TABLE,
    "Overlap": overlap.TABLE,
    "Recomputation, streaming, chunked loss": memory.TABLE,
}
TABLE: tuple[Refusal, ...] = tuple(refusal for section in SECTIONS.values() for refusal in section)

__all__ = ["SECTIONS", "TABLE", "Case", "Refusal", "problems"]


def problems(case: Case) -> Iterator[str]:
    """One line for each reason why ``case`` cannot be served."""
    for refusal in TABLE:
        if refusal.applies(case):
            yield refusal.says(case)
