"""Nothing is lost, order is kept, and the thread that puts does not wait."""

import threading
import time

import pytest

from trainsys.telemetry.batches import Batches


def test_everything_comes_in_order_from_another_thread() -> None:
    seen: list[tuple[int, int]] = []
    batches: Batches[int] = Batches(
        lambda some: seen.extend((i, threading.get_ident()) for i in some), "test", every_s=0.005
    )
    for i in range(300):
        batches.put(i)
        if i % 100 == 0:
            time.sleep(0.02)
    batches.close()
    assert [i for i, _ in seen] == list(range(300))
    assert {thread for _, thread in seen} != {threading.get_ident()}


@pytest.mark.timing
def test_one_that_hangs_is_left_behind() -> None:
    hang = threading.Event()
    batches: Batches[int] = Batches(lambda some: hang.wait(30) and None, "test", every_s=0.001)
    batches.put(1)
    began = time.monotonic()
    batches.close(timeout_s=0.05)
    assert time.monotonic() - began < 10
    hang.set()


def test_flush_does_not_wait_for_the_clock() -> None:
    seen = threading.Event()
    batches: Batches[int] = Batches(lambda some: seen.set(), "test", every_s=60.0)
    batches.put(1)
    assert not seen.wait(0.05)
    batches.flush()
    assert seen.wait(30)
    batches.close()
