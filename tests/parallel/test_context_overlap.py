"""Does communication hide behind computation? Real flavours and real ranks, but work that sleeps and a slow link.

Forward of the ring itself is in `test_overlap`, with the other switches.
"""

from __future__ import annotations

import pytest

from support.overlap.context import HOPS, WORLD, waits
from support.ranks import run_ranks

pytestmark = pytest.mark.timing


def _exposed(flavour: str, compute_s: float, comm_s: float, expected: float, way: str = "forward") -> float:
    """The wait of the average rank, in the attempt that came nearest to what is expected."""
    by_rank = run_ranks(WORLD, waits, flavour, compute_s, comm_s, way)
    return min((sum(a) / WORLD for a in zip(*by_rank, strict=True)), key=lambda wait: abs(wait - expected))


def test_ring_hides_both_streams_of_backward() -> None:
    """Keys and, one hop behind, their gradients; only the last gradients' way home has nothing to hide behind."""
    compute_s, comm_s = 0.06, 0.03
    exposed = _exposed("ring", compute_s, comm_s, comm_s, "backward")
    assert abs(exposed - comm_s) < 0.1 * (2 * HOPS + 1) * comm_s


def test_token_ring_sends_results_home_behind_computation_and_pass_q_at_the_end() -> None:
    """TokenRing waits for the last result alone, pass-Q for all of them."""
    compute_s, comm_s = 0.06, 0.03
    assert abs(_exposed("token_ring", compute_s, comm_s, comm_s) - comm_s) < 0.3 * comm_s
    at_the_end = HOPS * comm_s
    assert abs(_exposed("pass_q", compute_s, comm_s, at_the_end) - at_the_end) < 0.2 * at_the_end
