"""A block gives back what it was given, bit by bit, and takes few bytes."""

import math
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.made_run import Run
from trainsys.layout import Layout
from trainsys.telemetry import block
from trainsys.telemetry.events import Comm, DeviceStep, Event, Flops, Memory, Message, Metrics, Stall, Step
from trainsys.telemetry.packing import pack, unpack
from trainsys.telemetry.reader import event_file, read_events
from trainsys.telemetry.records import Gathering, NoColumns, Records, gathered
from trainsys.telemetry.step_columns import StepColumns

quiet = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
ODD = [0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1e308, 0.1, 1e-6, 1.79e9 + 1e-6, -2.5, 1e15 + 0.5]
floats = st.floats() | st.sampled_from(ODD) | st.integers(-(10**9), 10**9).map(lambda us: us / 1e6)
names = st.sampled_from(["forward", "comm/tp", "data", "", "a b", "é", "0"])


def bits(value: object) -> object:
    """Floats by their bits, since nan is not nan and -0.0 is 0.0."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    return [bits(inner) for inner in value] if isinstance(value, list) else (type(value), value)


@quiet
@given(st.lists(int64, max_size=80) | st.lists(st.integers(-300, 300), max_size=300))
def test_any_integers_come_back(values: list[int]) -> None:
    column = np.array(values, np.int64)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(pack(column)), type=type(pack(column)))
    assert unpack(again).tolist() == values


@pytest.mark.parametrize(
    ("values", "most"),
    [
        (np.arange(512) + 10**12, 60),
        (np.arange(512) ** 3, 80),
        (np.full(512, -7), 40),
        (np.random.default_rng(0).integers(0, 4, 512) * 4096, 280),
        (np.where(np.arange(512) == 99, 10**15, 0), 180),
    ],
    ids=["counter", "cubic", "constant", "pages", "one far out"],
)
def test_what_has_little_to_say_takes_little(values: np.ndarray, most: int) -> None:
    assert len(msgspec.msgpack.encode(pack(values.astype(np.int64)))) < most


def test_noise_takes_what_it_has() -> None:
    noise = np.rint(np.random.default_rng(0).normal(size=4096) * 1000).astype(np.int64)
    entropy = math.log2(1000 * math.sqrt(2 * math.pi * math.e))
    assert 8 * len(msgspec.msgpack.encode(pack(noise))) / noise.size < entropy + 0.5


json_values = st.recursive(
    st.none() | st.booleans() | int64 | floats | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(names, json_values, max_size=4)


@quiet
@given(st.lists(records, max_size=12))
def test_any_records_come_back(some: list[dict[str, object]]) -> None:
    batch = Gathering()
    for record in some:
        batch.add(record)
    again = block.load(block.dump(batch.records()))
    assert bits(list(again.rows())) == bits(some)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    axes = draw(st.sets(names, max_size=2))
    comm = {axis: {"all_reduce": Comm(draw(int64), draw(int64), draw(floats))} for axis in axes}
    return Step(
        step=draw(int64), start_s=draw(floats), step_time_s=draw(floats), comm=comm,
        phases=draw(st.dictionaries(names, floats, max_size=4)), stalls=draw(st.dictionaries(names, floats, max_size=2)),
        micro_us=draw(st.dictionaries(names, st.lists(int64, max_size=3), max_size=2)), tokens=draw(int64),
        loss=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)), lr=draw(st.none() | st.just(0.25)),
        memory=draw(st.none() | st.builds(Memory, peak=int64, rss=int64)),
        flops=draw(st.none() | st.builds(Flops, model=st.floats(0, 1e20), palm=st.none() | st.floats(0, 1e20))),
        mfu=draw(st.none() | floats),
    )  # fmt: skip


others = st.builds(Message, level=st.just("info"), text=st.text(max_size=5), time_s=st.just(1.0)) | st.builds(
    DeviceStep, step=int64, step_time_s=floats, phases=st.dictionaries(names, floats, max_size=2)
)


@quiet
@given(st.lists(steps() | others, max_size=10), st.none() | st.tuples(st.floats(1, 1e16), st.integers(1, 9)))
def test_any_events_come_back_in_order(some: list[Event], possible: block.Possible) -> None:
    """Other keys in each, steps again and backwards, clocks that jump, shares that do not follow from their FLOPs."""
    again = block.load(block.dump(gathered(some), possible))
    expected = [bits(msgspec.to_builtins(e)) for e in some]
    assert [bits(msgspec.to_builtins(e)) for e in again.events()] == expected


def test_a_share_of_the_peak_is_kept_by_what_it_follows_from() -> None:
    peak, world = 9.89e14, 7
    flops = [Flops(1e15 / (i + 1), None, 2e15) for i in range(64)]
    some = [Step(step=i, start_s=0.0, step_time_s=0.1 + i * 1e-6, flops=f) for i, f in enumerate(flops)]
    plain = len(block.dump(gathered(some), (peak, world)))
    for s in some:
        s.mfu = s.flops.model / (s.step_time_s * peak * world)  # type: ignore[union-attr]
    data = block.dump(gathered(some), (peak, world))
    assert len(data) < plain + 30
    assert list(block.load(data).events()) == some


def test_what_has_no_place_in_columns_is_refused() -> None:
    for record in ({"a": 1 << 63}, {"a\x1f": 1}, {"event": "\x1e"}, {"a": object()}):
        with pytest.raises(NoColumns):
            Gathering().add(record)


def test_columns_of_a_block_are_those_of_its_steps(tmp_path: Path) -> None:
    made = [e for e in Run(Layout(pp=2, tp=2)).record(None, 0, range(30)) if isinstance(e, Step)]
    some = [made[0], Stall(kind="gc", start_s=1.0, seconds=2.0), *made[1:], Metrics(step=3, values={"a": None})]
    columns = StepColumns(block.load(block.dump(gathered(some))))
    assert columns.step.tolist() == [s.step for s in made]
    assert columns.of("step_time_s").tolist() == [s.step_time_s for s in made]
    assert {n: v.tolist() for n, v in columns.named("phases").items()} == {
        n: [s.phases[n] for s in made] for n in made[0].phases
    }
    assert columns.nbytes["fsdp"].tolist() == [sum(c.bytes for c in s.comm["fsdp"].values()) for s in made]
    times, counts = columns.calls_us("forward")
    assert [row[:n].tolist() for row, n in zip(times, counts, strict=True)] == [s.micro_us["forward"] for s in made]


@quiet
@given(st.binary(max_size=80), st.integers(0, 2000), st.integers(1, 255))
def test_a_damaged_block_is_none(rubbish: bytes, at: int, change: int) -> None:
    assert block.of_line(b"#" + rubbish.replace(b"\n", b"") + b"\n") is None
    steps = gathered([Step(step=i, start_s=i / 7, step_time_s=0.1) for i in range(40)])
    whole = bytearray(block.to_line(block.dump(steps)))
    whole[at % (len(whole) - 1)] ^= change
    found = block.of_line(bytes(whole))
    assert found is None or isinstance(found, Records)
    for cut in range(0, len(whole), 7):
        assert block.of_line(bytes(whole[:cut])) is None


@pytest.mark.parametrize(
    "run",
    [
        Run(Layout(pp=2, tp=2)),
        Run(Layout(dp_shard=2, tp=2), packed=True),
        Run(Layout(pp=4), micro=16, packed=True),
        Run(Layout(pp=2, tp=2), device=True),
    ],
    ids=["pp2 tp2", "tp2 packed documents", "pp4 with 16 micro-batches", "with a device's clock"],
)
def test_a_step_and_rank_takes_less_than_fifty_bytes(tmp_path: Path, run: Run) -> None:
    count = 2000
    told = list(run.record(tmp_path, 1, range(count)))
    path = event_file(tmp_path, 1)
    plain = sum(len(msgspec.json.encode(e)) for e in told) / count
    print(f"{path.stat().st_size / count:.1f} bytes per step and rank on disk, {plain:.0f} as JSON")
    assert path.stat().st_size / count < 50 < plain / 10
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    kept = [e for e in read_events(path)[0] if isinstance(e, Step)]
    assert [e.step for e in kept] == list(range(count))
    # What is kept: each time to a part in 8192, and sums exactly.
    for event, step in zip(told, kept, strict=True):
        assert isinstance(event, Step)
        assert round(1e6 * sum(step.phases.values())) == round(1e6 * step.step_time_s)
        assert abs(event.step_time_s - step.step_time_s) < 2e-6
        for name in set(event.phases) - {"other"}:
            assert abs(event.phases[name] - step.phases[name]) <= max(2.1e-6, event.phases[name] / 4096)
        assert (event.loss, event.tokens, event.attn_pairs, event.memory, event.flops) == (
            step.loss, step.tokens, step.attn_pairs, step.memory, step.flops
        )  # fmt: skip
    last = kept[-1]
    wall = last.start_s + last.step_time_s + sum(last.stalls.values()) - kept[0].start_s
    assert sum(s.step_time_s + sum(s.stalls.values()) for s in kept) == pytest.approx(wall, abs=2e-6)
