"""A collective that takes longer from some step on: by its link, or because a member's process was kept from it."""

from __future__ import annotations

import numpy as np
import pytest

from trainsys.layout import Layout
from trainsys.profiler.links import slow_links
from trainsys.profiler.steps import StepTable, empty_table
from trainsys.telemetry.events import COMM

STEPS, BEGINS = 60, 30


def slowed(**grown: float) -> StepTable:
    """Two ranks whose 10 ms of communication are 40 ms from step 30 on, in which rank 1's counters grow by ``grown``."""
    rng = np.random.default_rng(0)
    table = empty_table(range(2), np.arange(STEPS), Layout(tp=2))
    table.work[:] = True
    later = np.arange(STEPS)[:, None] >= BEGINS
    took = np.where(later, 0.040, 0.010) * rng.lognormal(0, 0.02, (STEPS, 2))
    table.phases[COMM + "tp"] = took
    for name, more in grown.items():
        each = np.where(later, more, 0.0) * [0.0, 1.0]
        table.host[name] = np.cumsum(each, axis=0)
    return table


@pytest.mark.parametrize(
    ("grown", "links"),
    [
        ({}, 1),
        ({"others_s": 0.005, "wait_s": 0.005}, 1),
        ({"others_s": 0.025}, 0),
        ({"throttled_s": 0.030}, 0),
        ({"wait_s": 0.020}, 0),
    ],
)
def test_what_keeps_a_process_from_communicating_is_no_slow_link(grown: dict[str, float], links: int) -> None:
    work = np.random.default_rng(1).lognormal(np.log(0.02), 0.02, (STEPS, 2))
    found = slow_links(slowed(**grown), work, 0.0025, 0.06)
    assert [(v.kind, v.since) for v in found] == [("link", BEGINS)] * links
