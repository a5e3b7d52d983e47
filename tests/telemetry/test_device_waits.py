"""Exposed communication on a device is what its compute stream waits for: the recorder against virtual streams."""

from __future__ import annotations

from collections import defaultdict

import pytest

from support.virtual.cases import CASES, SLOW, traces
from support.virtual.play import Coupled, Played, Speeds
from trainsys.telemetry.events import COMM

LINKS = (5e9, 50e9, 400e9)
"""bytes/s: communication rules, is partly hidden, is mostly hidden"""
ALL = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", ALL)
def test_the_device_waterfall_says_what_the_compute_stream_waits_for(name: str) -> None:
    ranks = traces(name)
    coupled = Coupled(ranks)
    steps = [coupled.play(Speeds(link)) for link in LINKS]
    for trace in ranks:
        assert trace.foreign_marks == 0, "every mark is on the compute stream"
        assert len(trace.marks[1][0]) > 10
        for step in (played[trace.rank] for played in steps):
            assert step.backwards == 0
            assert sum(step.phases.values()) == pytest.approx(step.seconds, rel=1e-9), "it adds up"
            said, slack = exposed(step, trace.groups), 1e-3 * step.seconds
            assert sum(said.values()) == pytest.approx(sum(step.waited.values()), rel=0.02, abs=slack)
            for axis in {*said, *step.waited}:
                true = step.waited.get(axis, 0.0)
                assert said.get(axis, 0.0) == pytest.approx(true, rel=0.02, abs=slack), axis
        slow, _, fast = (played[trace.rank] for played in steps)
        assert sum(slow.waited.values()) > 2 * sum(fast.waited.values())
        assert sum(slow.waited.values()) > 0.2 * slow.seconds, "there is something to be seen"


def exposed(step: Played, same: dict[str, str]) -> dict[str, float]:
    """Seconds of communication by axis, as the marks have them; ``same``: axes of one process group are one, as
    `Played.waited` knows groups alone."""
    found: dict[str, float] = defaultdict(float)
    for phase, seconds in step.phases.items():
        if phase.startswith(COMM):
            axis = phase.removeprefix(COMM)
            found[same.get(axis, axis)] += seconds
    return found
