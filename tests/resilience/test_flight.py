"""A hung rank's recorder: the library's own, and what the device waits for in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from trainsys.resilience import flight
from trainsys.resilience.flight import DeviceState, dump_flight_recorder, read_state
from trainsys.resilience.watchdog import RankState, explain

GROUPS = {"0": ("default_pg", range(4)), "1": ("fsdp", range(4)), "2": ("tp", range(2))}


def entry(number: int, group: str, sequence: int, op: str, state: str) -> dict[str, Any]:
    return {
        "record_id": number,
        "process_group": (group, GROUPS[group][0]),
        "pg_id": int(group),
        "collective_seq_id": sequence,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": f"nccl:{op}",
        "input_sizes": ((8,),),
        "input_dtypes": ["Float"],
        "state": state,
        "frames": [],
    }


def nccl_dump(entries: list[dict[str, Any]], done: dict[str, tuple[int, int]]) -> bytes:
    config = {n: {"name": n, "desc": d, "ranks": str(list(r))} for n, (d, r) in GROUPS.items()}
    status = {
        n: {"last_enqueued_collective": a, "last_started_collective": a, "last_completed_collective": b}
        for n, (a, b) in done.items()
    }
    return pickle.dumps({"version": "2.10", "pg_config": config, "pg_status": status, "entries": entries})


WAITS = nccl_dump(
    [entry(0, "2", 6, "all_reduce", "completed"), entry(1, "1", 4, "_all_gather_base", "started")],
    {"2": (6, 6), "1": (4, 3)},
)
IDLE = nccl_dump([entry(0, "1", 3, "_all_gather_base", "completed")], {"1": (3, 3)})


def test_a_device_waits_for_its_oldest_unfinished_collective(tmp_path: Path) -> None:
    (tmp_path / "rank_00001.flight.pickle").write_bytes(WAITS)
    state = read_state(tmp_path / "rank_00001.flight.pickle")
    assert state == DeviceState("all_gather_base on fsdp", "all_reduce on tp", {"tp": 6, "fsdp": 3})
    (tmp_path / "rank_00002.flight.pickle").write_bytes(IDLE)
    idle = read_state(tmp_path / "rank_00002.flight.pickle")
    assert idle == DeviceState("", "all_gather_base on fsdp", {"fsdp": 3})
    (tmp_path / "rank_00003.flight.pickle").write_bytes(b"\x80\x04damaged")
    assert read_state(tmp_path / "rank_00003.flight.pickle") is None


def test_under_nccl_its_own_recorder_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: WAITS, raising=False)
    monkeypatch.setattr(c10d, "_dump_fr_trace", lambda: IDLE, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(flight.dist, "get_backend", lambda: "nccl")
    state = dump_flight_recorder(tmp_path / "rank_00001.flight.pickle")
    assert state is not None
    assert state.doing == "all_gather_base on fsdp"
    assert (tmp_path / "rank_00001.flight.pickle").read_bytes() == WAITS
    monkeypatch.setattr(flight.dist, "get_backend", lambda: "gloo")
    assert dump_flight_recorder(tmp_path / "rank_00002.flight.pickle") is None, "its host is in what it waits for"
    assert (tmp_path / "rank_00002.flight.pickle").read_bytes() == IDLE


def test_the_report_names_the_rank_whose_host_never_came(tmp_path: Path) -> None:
    """On a device every host is out of its collectives when it hangs: by the hosts all four ranks would be missing."""
    states = {}
    for rank in range(4):
        path = tmp_path / f"rank_{rank:05d}.flight.pickle"
        path.write_bytes(IDLE if rank == 2 else WAITS)
        device = read_state(path)
        assert device is not None
        states[rank] = RankState(
            rank, 7, 60.0, device.doing, device.last, device.counts, "train.py:10 in data"
        )
    text = explain(states, 4)
    assert "ranks 0, 1, 3 are in all_gather_base on fsdp" in text
    assert text.count("missing") == 1
    assert "rank 2 is missing" in text
