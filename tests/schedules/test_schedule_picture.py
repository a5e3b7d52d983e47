"""The picture shows what the simulation says."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from trainsys.schedules import NAMES, Times, build, simulate
from trainsys.schedules.picture import svg, text


def test_text_of_a_small_schedule() -> None:
    assert text(simulate(build("1f1b", 2, 3), Times())).splitlines() == [
        "1f1b: 2 ranks × 1 stages, 3 micro-batches, step 12, bubble 25.0%, micro-batches in flight by rank 2, 1",
        "rank 0  F0F1····B0  F2B1  ··B2  ",
        "rank 1  ··F0B0  F1B1  F2B2  ····",
    ]


def test_second_stages_are_lower_case() -> None:
    rows = text(simulate(build("zbv", 2, 2), Times())).splitlines()
    assert rows[2].startswith("rank 1  ··F0f0")


@pytest.mark.parametrize("name", NAMES)
def test_svg_has_every_action(name: str) -> None:
    timeline = simulate(build(name, 4, 8), Times(10, 12, 8))
    root = ET.fromstring(svg(timeline))
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == sum(map(len, timeline.schedule.orders))
    assert "F stage 0, micro-batch 0: 0 to 10" in titles
