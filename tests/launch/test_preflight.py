from __future__ import annotations

from dataclasses import replace

import pytest

from trainsys.launch.bandwidth import AxisRate
from trainsys.launch.preflight import FREE_BYTES, Report, judge

FIT = Report(
    rank=0,
    host="n0",
    versions={"torch": "2.13.0", "python": "3.11.7"},
    on_devices=True,
    matmul_flops=4e14,
    matmul_right=True,
    memory_bytes_s=2e12,
    memory_right=True,
    clock_s=0.01,
    free_bytes=FREE_BYTES * 10,
    sees_shared=True,
    folder="/runs",
)


def fleet(**changes: object) -> list[Report]:
    """Eight ranks on four nodes; ``changes`` are those of rank 5, on n2."""
    ranks = [replace(FIT, rank=n, host=f"n{n // 2}", matmul_flops=4e14 + n * 1e12) for n in range(8)]
    ranks[5] = replace(ranks[5], **changes)  # type: ignore[arg-type]
    return ranks


def test_a_fit_fleet_has_no_problem() -> None:
    assert judge(fleet()) == []
    assert judge([FIT]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"matmul_right": False}, "rank 5: a matrix product came out wrong"),
        ({"memory_right": False}, "rank 5: memory does not hold"),
        ({"matmul_flops": 1e14}, "rank 5: matmul at 100 TFLOP/s, the median rank at 402"),
        ({"memory_bytes_s": 1e12}, "rank 5: memory at 1e+03 GB/s, the median rank at 2e+03"),
        ({"clock_s": -7.0}, "its clock is -7.0 s off"),
        ({"free_bytes": 2**29}, "0.5 GiB free in /runs"),
        ({"sees_shared": False}, "/runs is not the folder that rank 0 sees"),
        ({"versions": {"torch": "2.12.0", "python": "3.11.7"}}, "torch 2.12.0, but most ranks have 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "python missing, but most ranks have 3.11.7"),
    ],
)
def test_the_bad_node_is_named(changes: dict[str, object], says: str) -> None:
    (problem,) = judge(fleet(**changes))
    assert problem.host == "n2"
    assert problem.sure
    assert says in str(problem)


def test_of_two_that_differ_neither_is_surely_wrong() -> None:
    two = [r for r in fleet() if r.host in ("n0", "n1")]
    for changes in ({"clock_s": 9.0}, {"versions": {}}, {"sees_shared": False}):
        found = judge([replace(r, **changes) if r.host == "n1" else r for r in two])  # type: ignore[arg-type]
        assert {(p.host, p.sure) for p in found} == {("n1", False)}
    slow = judge([replace(r, matmul_flops=1e13) if r.host == "n1" else r for r in two])
    assert {(p.host, p.sure) for p in slow} == {("n1", True)}
    full = judge([replace(r, free_bytes=0) for r in two])
    assert {(p.host, p.sure) for p in full} == {("n0", False), ("n1", False)}, "what all have is nobody's"


def test_cores_may_be_shared() -> None:
    half = [
        replace(r, on_devices=False, matmul_flops=r.matmul_flops * (0.5 if r.rank == 5 else 1))
        for r in fleet()
    ]
    assert judge(half) == []
    tenth = [replace(r, matmul_flops=4e13) if r.rank == 5 else r for r in half]
    assert [p.host for p in judge(tenth)] == ["n2"]


def test_a_slow_network_is_a_nodes_problem() -> None:
    rate = AxisRate("fsdp", tuple(range(8)), 1e9)
    ranks = [replace(r, axes=(rate,)) for r in fleet()]
    assert judge(ranks) == []
    (problem,) = judge(ranks, {"fsdp": 50e9})
    assert "fsdp: all-reduce of ranks 0-7 at 1 GB/s per rank, 50 expected" in str(problem)


def test_a_node_is_named_once_for_what_all_its_ranks_have() -> None:
    ranks = [replace(r, free_bytes=0) if r.host == "n1" else r for r in fleet()]
    assert [p.host for p in judge(ranks)] == ["n1"]
