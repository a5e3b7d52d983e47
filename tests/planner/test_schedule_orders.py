"""The planner's pipeline orders against torch's own, and laws that any order obeys."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.errors import UserError
from trainsys.planner.schedule_orders import Op, order, rank_of

_CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb1": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def _torch_order(schedule: str, p: int, m: int, v: int) -> list[list[Op]]:
    """torch's action list of every rank, asked of its class without building stages."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    cls = getattr(schedules, _CLASSES["interleaved" if schedule == "looped" else schedule])
    self = object.__new__(cls)
    self.__dict__.update(
        pp_group_size=p, n_local_stages=v, _n_microbatches=m, _num_stages=p * v, num_stages=p * v,
        microbatches_per_round=m // max(1, m // p), _stages=[SimpleNamespace()] * v, rank=0,
    )  # fmt: skip
    if v == 1 and schedule in ("gpipe", "1f1b"):
        ranks = cls._get_pipeline_order(self)
    else:
        ranks = {r: cls._calculate_single_rank_operations(self, r) for r in range(p)}
    flat = []
    for r in range(p):
        ops = []
        for action in ranks[r]:
            if action is None:
                continue
            for a in action.sub_actions or (action,):
                if a.computation_type.name in _KINDS:
                    ops.append(Op(_KINDS[a.computation_type.name], a.stage_index, a.microbatch_index))
        flat.append(ops)
    return flat


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("schedule", "v", "ms"), [
    ("gpipe", 1, (1, 4, 9)),
    ("1f1b", 1, (8, 11, 16)),
    ("interleaved", 2, (8, 16, 24)),
    ("interleaved", 3, (8, 16)),
    ("zb1", 1, (8, 16)),
    ("zb1", 2, (8, 16)),
    ("zbv", 2, (4, 8, 15, 21)),
    ("dualpipev", 2, (16, 17, 24)),
])  # fmt: skip
def test_order_is_torchs(schedule: str, v: int, ms: tuple[int, ...], p: int) -> None:
    for m in ms:
        if schedule in ("interleaved", "zb1") and m % max(1, m // p):
            continue
        ours, theirs = order(schedule, p, m, v), _torch_order(schedule, p, m, v)
        if schedule == "1f1b":
            # torch 2.13 prints the last rank's forwards one micro-batch late; what it runs is right.
            theirs[-1] = [op._replace(mb=op.mb - 1) if op.kind == "F" else op for op in theirs[-1]]
        assert ours == theirs, (schedule, p, m, v)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb1", 1), ("zb1", 3), ("zbv", 2), ("dualpipev", 2)]),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_every_stage_and_micro_batch_once_on_its_rank(kind: tuple[str, int], p: int, k: int) -> None:
    schedule, v = kind
    m = 2 * p * k
    seen: Counter[tuple[str, int, int]] = Counter()
    for r, ops in enumerate(order(schedule, p, m, v)):
        for op in ops:
            assert rank_of(schedule, op.stage, p) == r
            for half in {"B": "IW"}.get(op.kind, op.kind):
                seen[half, op.stage, op.mb] += 1
    assert seen == {(kind, s, b): 1 for kind in "FIW" for s in range(p * v) for b in range(m)}


@pytest.mark.parametrize(("call", "says"), [
    (("zbubble", 2, 4, 1), "known are"),
    (("1f1b", 2, 4, 2), "1 stage a rank"),
    (("dualpipev", 4, 7, 2), "at least 8 would work"),
    (("interleaved", 4, 10, 2), None),
    (("interleaved", 4, 9, 2), "8 would work"),
    (("gpipe", 0, 4, 1), "at least 1"),
])  # fmt: skip
def test_refusals_say_what_works(call: tuple[str, int, int, int], says: str | None) -> None:
    if says is None:
        assert order(*call)
    else:
        with pytest.raises(UserError, match=says):
            order(*call)
