"""The planner's exact account of a rank equals a dry run of its real step, which equals real ranks."""

from __future__ import annotations

import pytest

from support.dry import of_case
from support.dry_cases import CASES, world
from trainsys.layout import Layout
from trainsys.planner.exact import Place, states, step_flops, step_traffic

# The first of them waits for the dry runs of all cases.
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_run(name: str) -> None:
    cfg = CASES[name]
    layout = Layout.resolve(cfg.parallel, world(cfg))
    for dry in of_case(name):
        place = Place(cfg, layout, dry.rank)
        counted = {
            (axis, op): sent for axis, ops in dry.traffic.items() for op, (_, sent) in ops.items() if sent
        }
        assert step_traffic(place) == counted
        flops = step_flops(place)
        assert flops is None or flops == dry.total_flops
        for part, size in states(place).items():
            assert dry.held[part] == size, part
