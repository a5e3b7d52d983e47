"""Work on several processes at once: that it is at once, what is made of its stamps, and how failures end."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from trainsys.bench.together import (
    Stamps,
    Work,
    _collect,
    _Failure,
    combined_rate,
    fastest_rate,
    repeat,
    run_together,
)


def _sleeper(variant: int, device: torch.device) -> Work:
    return Work(partial(time.sleep, 0.002), float(100 * variant + torch.get_num_threads()))


def _first_fails(marker: str, how: str, variant: int, device: torch.device) -> Work:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return _sleeper(variant, device)
    if how == "dies":
        os._exit(7)
    raise ValueError("no such shape")


def steady(start: float, rate: float, calls: int = 100, amount: float = 1.0) -> Stamps:
    return Stamps([start + i * amount / rate for i in range(calls + 1)], amount)


def test_rates_add_up_over_processes() -> None:
    assert combined_rate([steady(0, 10)]) == pytest.approx(10)
    assert combined_rate([steady(0, 10), steady(1, 30, amount=4)]) == pytest.approx(40)


def test_only_the_time_when_all_worked_counts() -> None:
    alone_faster = Stamps([0, 1, 2, 3, 4, 4.1, 4.2, 4.3, 4.4, 4.5], 1.0)
    assert combined_rate([alone_faster, steady(0, 1, calls=4)]) == pytest.approx(2)
    with pytest.raises(AssertionError, match="at work"):
        combined_rate([steady(0, 10, calls=5), steady(10, 10)])


def test_a_disturbed_stretch_is_left_out() -> None:
    times = [i * 0.1 for i in range(51)] + [5 + 2 + i * 0.1 for i in range(1, 51)]  # two seconds of nothing
    assert combined_rate([Stamps(times, 1.0)]) == pytest.approx(10, rel=0.05)
    mean = 100 / times[-1]
    assert mean < 9


def test_other_load_does_not_lower_the_fastest_rate() -> None:
    """Nine calls in ten wait for another process, up to a second: a mean, or a median, is that process's."""
    quick, slow = [0.001] * 20, [0.1 * (1 + i % 10) for i in range(180)]
    times = [0.0]
    for i in range(20):
        for seconds in (*slow[9 * i : 9 * i + 9], quick[i]):
            times.append(times[-1] + seconds)
    busy = Stamps(times, 5.0)
    assert fastest_rate(busy) == pytest.approx(5000)
    assert combined_rate([busy]) < 20
    # A single call that was too quick to be true is not the ceiling.
    assert fastest_rate(Stamps([0.0, 1e-9, *(1e-9 + i / 10 for i in range(1, 100))], 1.0)) == pytest.approx(10)


def test_repeat_stamps_every_call() -> None:
    calls = []
    stamps = repeat(Work(lambda: calls.append(1), 3.0), 0.01, torch.device("cpu"))
    assert len(stamps.times_s) == len(calls) + 1 >= 5
    assert stamps.times_s == sorted(stamps.times_s)
    assert stamps.times_s[-1] - stamps.times_s[0] >= 0.01
    slow = repeat(Work(lambda: time.sleep(0.002), 1.0), 1e-9, torch.device("cpu"))
    assert len(slow.times_s) == 5


@pytest.mark.timing
def test_processes_work_at_the_same_time_with_their_threads() -> None:
    stamps = run_together(_sleeper, 2, processes=3, threads=2, seconds=0.05, device="cpu")
    assert [[s.amount for s in variant] for variant in stamps] == [[2.0] * 3, [102.0] * 3]
    for variant in stamps:
        assert max(s.times_s[0] for s in variant) < min(s.times_s[-1] for s in variant)
    assert max(s.times_s[-1] for s in stamps[0]) <= min(s.times_s[0] for s in stamps[1])


@pytest.mark.parametrize(("how", "says"), [("raises", "ValueError: no such shape"), ("dies", "died")])
def test_one_failure_ends_all(tmp_path: Path, how: str, says: str) -> None:
    make = partial(_first_fails, str(tmp_path / "marker"), how)
    with pytest.raises(RuntimeError, match=says):
        run_together(make, 1, processes=2, threads=1, seconds=0.05, device="cpu")


def test_the_error_that_is_told_is_the_one_that_others_follow() -> None:
    pairs = [multiprocessing.Pipe(duplex=False) for _ in range(3)]
    one = Stamps([0.0, 1.0], 1.0)
    for message in (one, _Failure("BrokenBarrierError", follows=True)):
        pairs[0][1].send(message)
    for message in (one, _Failure("ValueError: no such shape", follows=False)):
        pairs[1][1].send(message)
    with pytest.raises(RuntimeError, match="process 1: ValueError: no such shape"):
        _collect([receive for receive, _ in pairs], 2)
