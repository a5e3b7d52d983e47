"""The sha256 of many files side by side is hashlib's, whatever their lengths, and without a compiler too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.checkpoint import lanes
from trainsys.checkpoint.lanes import BLOCK, LANES, sha256_each


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    """The compiled function also where the processor has instructions of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lanes, "_features", lambda: frozenset({"avx2"}))
        lanes._kernel.cache_clear()
        made = lanes._kernel()
    lanes._kernel.cache_clear()
    if made is None:
        pytest.skip("no C compiler, or none that serves this processor")
    return made


@pytest.fixture
def with_kernel(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_kernel", lambda: kernel)


def file(seed: int, *sizes: int) -> list[memoryview]:
    return [memoryview(bytes((seed * 31 + i * 7 + k) % 256 for k in range(n))) for i, n in enumerate(sizes)]


def check(files: list[list[memoryview]]) -> None:
    assert sha256_each(files) == [hashlib.sha256(b"".join(f)).hexdigest() for f in files]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 400), min_size=0, max_size=3), max_size=40))
def test_it_is_sha256_whatever_the_pieces(kernel, lengths) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_kernel", lambda: kernel)
        check(
            [
                file(i, *(BLOCK * (n // BLOCK) for n in sizes[:-1]), *sizes[-1:])
                for i, sizes in enumerate(lengths)
            ]
        )
        check([file(i, *sizes) for i, sizes in enumerate(lengths)])


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("rest", [0, 1, 55, 56, 63])
def test_padding_at_every_edge(rest: int) -> None:
    check([file(i, 2 * BLOCK, BLOCK * i + rest) for i in range(LANES + 5)])


def test_the_lanes_are_used_and_one_long_file_does_not_empty_them(
    kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = lanes._together

    def counted(kernel, files, stop):
        taken.append(len(files))
        return real(kernel, files, stop)

    monkeypatch.setattr(lanes, "_kernel", lambda: kernel)
    monkeypatch.setattr(lanes, "_together", counted)
    check([file(i, 1000) for i in range(20)])
    check([*(file(i, 1000) for i in range(10)), file(99, 100_000)])
    check([file(i, 1000) for i in range(3)])
    assert taken == [20, 10]


def test_without_a_compiler_or_with_a_wrong_one_hashlib_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lanes, "_features", lambda: frozenset({"avx2"}))
    monkeypatch.setenv("CC", "false")
    lanes._kernel.cache_clear()
    assert lanes._kernel() is None
    check([file(i, 500) for i in range(20)])
    monkeypatch.delenv("CC")
    wrong = tmp_path / "lanes.c"
    wrong.write_text(lanes._SOURCE.read_text().replace("0x428a2f98", "0x428a2f99"))
    monkeypatch.setattr(lanes, "_SOURCE", wrong)
    lanes._kernel.cache_clear()
    assert lanes._kernel() is None, "what gives something else than sha256 is not used"
    lanes._kernel.cache_clear()


@pytest.mark.parametrize("n", [3, 20])
def test_it_can_be_given_up(with_kernel, n: int) -> None:
    with pytest.raises(InterruptedError):
        sha256_each([file(i, 1000) for i in range(n)], lambda: True)
