"""Records survive the trip through JSON and through a gathered vector."""

import math
import subprocess
import sys

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trainsys.layout import AXES
from trainsys.telemetry.events import COMM, COMM_AXES, PHASES, AnyEvent, Comm, Memory, Metrics, Step
from trainsys.telemetry.vectors import BYTES, TIMED, VECTOR, to_vector

seconds = st.floats(0, 1e4)
maybe = st.none() | st.floats(-1e6, 1e6)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    phases = draw(
        st.dictionaries(st.sampled_from((*PHASES, "comm/tp", "comm/fsdp", "mystery", "comm/odd")), seconds)
    )
    comm = {
        axis: {"all_reduce": Comm(draw(st.integers(1, 9)), draw(st.integers(0, 1 << 40)), 0.0)}
        for axis in draw(st.sets(st.sampled_from(("tp", "fsdp", "odd"))))
    }
    return Step(
        step=draw(st.integers(0, 1 << 40)),
        start_s=0.0,
        step_time_s=math.fsum(phases.values()),
        phases=phases,
        comm=comm,
        tokens=draw(st.integers(0, 1 << 50)),
        attn_pairs=draw(st.integers(0, 1 << 52)),
        loss=draw(maybe),
        lr=draw(maybe),
        memory=Memory(allocated=draw(st.integers(0, 1 << 48)), peak=draw(st.integers(0, 1 << 48))),
    )


@given(steps())
def test_vector_keeps_what_it_names(step: Step) -> None:
    vector = to_vector(step)
    assert len(vector) == len(VECTOR) == len(set(VECTOR))
    back = dict(zip(VECTOR, vector, strict=True))
    for name in ("step", "step_time_s", "tokens", "attn_pairs"):
        assert back[name] == getattr(step, name)
    for name in ("loss", "lr", "grad_norm"):
        value = getattr(step, name)
        assert math.isnan(back[name]) if value is None else back[name] == value
    assert step.memory is not None
    assert (back["allocated"], back["peak"]) == (step.memory.allocated, step.memory.peak)
    timed = sum(back[name] for name in TIMED)
    assert math.isclose(timed, sum(step.phases.values()), rel_tol=1e-9, abs_tol=1e-12)
    comm = sum(s for name, s in back.items() if name.startswith(COMM))
    assert math.isclose(comm, step.comm_s, rel_tol=1e-9, abs_tol=1e-12)
    moved = {name[len(BYTES) :]: n for name, n in back.items() if name.startswith(BYTES) and n}
    expected = {a if a in COMM_AXES else "unknown": ops["all_reduce"].bytes for a, ops in step.comm.items()}
    assert moved == {axis: n for axis, n in expected.items() if n}


@given(steps())
def test_json_round_trip(step: Step) -> None:
    assert msgspec.json.decode(msgspec.json.encode(step), type=AnyEvent) == step


def test_values_that_json_cannot_hold_come_back() -> None:
    step = Step(step=1, start_s=0.0, step_time_s=1.0, loss=math.nan, lr=0.5, nonfinite={"loss": "nan"})
    back = msgspec.json.decode(msgspec.json.encode(step), type=AnyEvent)
    assert isinstance(back, Step)
    assert back.loss is not None
    assert math.isnan(back.loss)
    assert back.lr == 0.5
    line = b'{"event":"metrics","step":1,"values":{"a":1.0},"nonfinite":{"b":"-inf","c":"rubbish"}}'
    values = msgspec.json.decode(line, type=Metrics).values
    assert values["a"] == 1.0
    assert values["b"] == -math.inf
    assert math.isnan(values["c"])


def test_every_axis_of_a_layout_has_a_place() -> None:
    assert set(AXES) <= set(COMM_AXES)


def test_reading_events_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, trainsys.telemetry.reader, trainsys.telemetry.recorder, trainsys.telemetry.report;"
        "print([m for m in ('torch', 'pydantic', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
