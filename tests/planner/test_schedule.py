"""Simulated schedules against closed forms, and the pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.planner.schedule import simulate
from trainsys.planner.schedule_view import svg, text


@given(st.integers(1, 8), st.integers(1, 12), st.floats(0.1, 5), st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_1f1b_and_gpipe_take_m_plus_p_minus_1_slots(p: int, m: int, f: float, b: float) -> None:
    for schedule in ("1f1b", "gpipe"):
        sim = simulate(schedule, p, m, forward=f, backward_input=b / 2, backward_weight=b / 2)
        assert sim.span == pytest.approx((m + p - 1) * (f + b))
        assert sim.bubble == pytest.approx((p - 1) / (m + p - 1))


def test_1f1b_holds_its_depth_and_gpipe_everything() -> None:
    one, all_ = simulate("1f1b", 4, 12), simulate("gpipe", 4, 12)
    assert [one.in_flight(r) for r in range(4)] == [4, 3, 2, 1]
    assert [all_.in_flight(r) for r in range(4)] == [12] * 4


def test_interleaving_divides_the_bubble() -> None:
    """Narayanan et al. 2021: time of the bubble is (p-1)(f+b)/v."""
    p, m, v = 4, 16, 2
    sim = simulate("interleaved", p, m, v, forward=0.5, backward_input=0.5, backward_weight=0.5)
    assert sim.span - sim.busy(0) == pytest.approx((p - 1) * (0.5 + 1.0), rel=0.35)
    assert sim.span < simulate("1f1b", p, m).span


def test_zero_bubble_fills_with_weight_gradients() -> None:
    """Qi et al. 2023: with F = I = W the bubble falls from 3(p-1) to p-1 units, and to none with a V after filling."""
    p, m = 4, 16
    zb, plain = simulate("zb1", p, m), simulate("1f1b", p, m)
    assert plain.span - plain.busy(0) == pytest.approx(3 * (p - 1))
    assert zb.span - zb.busy(0) == pytest.approx(p - 1)
    v = simulate("zbv", p, m, 2, forward=0.5, backward_input=0.5, backward_weight=0.5)
    assert v.span - v.busy(0) < 2.0


def test_slow_stage_sets_the_pace_and_transfers_delay() -> None:
    even = simulate("1f1b", 3, 9)
    slow = simulate("1f1b", 3, 9, forward=[1, 1, 2], backward_input=[1, 1, 2], backward_weight=[1, 1, 2])
    assert slow.span == pytest.approx(9 * 6 + 6)
    late = simulate("1f1b", 3, 9, transfer=0.5)
    assert late.span >= even.span + 4 * 0.5


def test_pictures_show_every_operation() -> None:
    sim = simulate("zbv", 2, 4, 2)
    root = ElementTree.fromstring(svg(sim))
    titles = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 2 * 4 * 3
    assert any(t.startswith("W stage 3 micro-batch 3") for t in titles)
    lines = text(sim, 40).splitlines()
    assert lines[0].startswith("  0 F")
    assert "bubble" in lines[-1]
