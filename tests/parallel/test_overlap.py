"""Each switch hides what arithmetic says it can: exposed = max(0, communication - computation), and nothing when off."""

from __future__ import annotations

import pytest

from support.overlap import CASES, Switch, exposed
from support.ranks import run_ranks

pytestmark = pytest.mark.timing

ROUNDS = 4
"""On a machine that is busy with other things ranks wake late, in every attempt of one round perhaps."""


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(
    ("comm_s", "compute_s"), [(0.08, 0.03), (0.03, 0.06)], ids=["comm>compute", "comm<compute"]
)
@pytest.mark.parametrize("switch", CASES, ids=lambda s: s.name)
def test_exposed_time_is_what_computation_does_not_cover(
    switch: Switch, comm_s: float, compute_s: float, on: bool
) -> None:
    expected = switch.predict(on, comm_s, compute_s)
    everything = switch.predict(False, comm_s, compute_s)
    assert expected < everything if on else expected == everything
    # Within 10%; of all communication where it hides and hardly anything is left to take a tenth of.
    tolerance = 0.1 * (expected if comm_s > compute_s else everything)
    for _ in range(ROUNDS):
        waited = exposed(run_ranks(switch.world, switch.measure, on, comm_s, compute_s), expected)
        if abs(waited - expected) < tolerance:
            break
    assert abs(waited - expected) < tolerance, (waited, expected)
