"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.telemetry import text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0000123, "12 us"),
        (0.00123, "1.2 ms"),
        (0.0999, "99.9 ms"),
        (0.4567, "457 ms"),
        (0.9996, "1.00 s"),
        (9.5, "9.50 s"),
        (45.67, "45.7 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (11220, "3 h 07 min"),
        (367200, "4 d 06 h"),
        (-125, "-2 min 05 s"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (12345, "12,345"),
        (999_600, "1.00 M"),
        (1.234e6, "1.23 M"),
        (45.6e9, "45.6 B"),
        (789e12, "789 T"),
    ],
)
def test_count(value: float, shown: str) -> None:
    assert text.count(value) == shown


def test_size_and_rate() -> None:
    assert text.size(0) == "0 MiB"
    assert text.size(640 << 10) == "640 KiB"
    assert text.size(312 << 20) == "312 MiB"
    assert text.size(1.5 * (1 << 30)) == "1.50 GiB"
    assert text.size(61.44 * (1 << 30)) == "61.4 GiB"
    assert text.rate(92.13e9) == "92.1 GFLOP/s"
    assert text.rate(989e12) == "989 TFLOP/s"
    assert text.rate(1.979e15) == "1.98 PFLOP/s"
    assert text.rate(5e5) == "0.5 MFLOP/s"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_percents_sum_to_a_hundred_and_are_near(parts: list[float]) -> None:
    shown = text.percents(parts)
    if sum(parts) > 1e-300:
        tenths = [round(float(s.rstrip("%")) * 10) for s in shown]
        assert sum(tenths) == 1000
        for part, tenth in zip(parts, tenths, strict=True):
            assert abs(tenth / 10 - 100 * part / sum(parts)) <= 0.1001


def test_ascii_only() -> None:
    assert text.ascii_only("a · b=2 × c → d – é") == "a | b=2 x c -> d - ?"
