from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainsys.errors import MachineFault, UserError
from trainsys.launch import network
from trainsys.launch.rank import adopt, prepare

ROOT = Path(__file__).resolve().parents[2]


def slurm_variables(**changes: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "127.0.0.[11-14]",
        "PATH": os.environ["PATH"],
        **changes,
    }


def test_a_rank_learns_its_place_from_slurm() -> None:
    env = slurm_variables()
    prepare(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == (
        "5",
        "7",
        "1",
        "2",
    )
    assert env["MASTER_ADDR"] == "127.0.0.11"
    assert env["GLOO_SOCKET_IFNAME"] == "lo"
    assert env["NCCL_SOCKET_IFNAME"] == "=lo"
    last = slurm_variables(SLURM_NODEID="3", SLURM_PROCID="6", SLURM_LOCALID="0")
    prepare(last)
    assert last["LOCAL_WORLD_SIZE"] == "1"


def test_a_step_of_fewer_tasks_than_its_job_is_a_world_of_its_own() -> None:
    env = slurm_variables(
        SLURM_PROCID="1",
        SLURM_NODEID="0",
        SLURM_STEP_ID="3",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_TASKS_PER_NODE="2",
        SLURM_STEP_NODELIST="127.0.0.13",
    )
    adopt(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("1", "2", "2")
    assert env["MASTER_ADDR"] == "127.0.0.13"
    other = slurm_variables(SLURM_STEP_ID="4", SLURM_STEP_NUM_TASKS="2")
    adopt(other)
    assert other["MASTER_PORT"] != env["MASTER_PORT"]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script's own process
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
        },  # torchrun by srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone_or_has_its_place_is_left_as_it_is(env: dict[str, str]) -> None:
    before = dict(env)
    adopt(env)
    assert env == before


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but RANK is not set"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2, but RANK is not set"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
    ],
)
def test_one_of_several_processes_without_a_place_is_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        adopt(env)


def test_each_attempt_meets_at_a_port_of_its_own() -> None:
    ports = set()
    for job in range(1, 4):
        for attempt in range(4):
            env = slurm_variables(SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=str(attempt))
            prepare(env)
            ports.add(int(env["MASTER_PORT"]))
    assert len(ports) == 12
    assert all(1024 < port < 32768 for port in ports)


def test_what_the_user_has_set_stays() -> None:
    env = slurm_variables(GLOO_SOCKET_IFNAME="ib0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    prepare(env)
    assert (env["GLOO_SOCKET_IFNAME"], env["MASTER_ADDR"], env["MASTER_PORT"]) == (
        "ib0",
        "127.0.0.1",
        "29999",
    )


def test_an_address_given_by_hand_saves_asking_for_the_head_nodes_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(network, "resolve", lambda host: asked.append(host) or host)
    prepare(slurm_variables(SLURM_JOB_NODELIST="nowhere.invalid", MASTER_ADDR="127.0.0.1"))
    assert asked == ["127.0.0.1"]


def test_a_head_node_without_an_address_is_a_machines_fault_of_one_line() -> None:
    with pytest.raises(
        MachineFault, match=r"head node nowhere\.invalid: .* cannot resolve this name"
    ) as error:
        network.resolve("nowhere.invalid", patience_s=0.0)
    assert "\n" not in str(error.value)


def test_a_name_that_is_not_known_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod's name reaches the name service after the pod has started; so does that of a node just set up."""
    asked: list[str] = []

    def later(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        if len(asked) < 4:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6, 1, 6, "", ("::7", 0)), (socket.AF_INET, 1, 6, "", ("10.0.0.7", 0))]

    waits: list[float] = []
    monkeypatch.setattr(network.socket, "getaddrinfo", later)
    monkeypatch.setattr(network.time, "sleep", waits.append)
    assert network.resolve("node-7") == "10.0.0.7"
    assert asked == ["node-7"] * 4
    assert len(waits) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "not a line for each try"
    assert "cannot resolve this name (Name or service not known); trying again for 300 s" in said[0]
    assert said[1] == "trainsys: head node node-7: its name resolves now"


def test_outside_of_srun() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID is not set"):
        prepare({})


def test_an_interface_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(MachineFault, match=r"interface ib7: .* it has .*lo \(127\.0\.0\.1\)"):
        network.check("ib7", "127.0.0.1", 1)


def test_a_refused_connection_is_an_answer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    network.check("lo", "127.0.0.1", port)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces: a private net between them (left0, right0), and on the right one a dead end, dead0."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    left, right = f"tsl{os.getpid()}", f"tsr{os.getpid()}"
    try:
        try:
            run("ip", "netns", "add", left)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
        run("ip", "netns", "add", right)
        run(
            "ip", "-n", left, "link", "add", "left0", "type", "veth", "peer", "name", "right0", "netns", right
        )
        run("ip", "-n", left, "addr", "add", "10.77.0.1/24", "dev", "left0")
        run("ip", "-n", right, "addr", "add", "10.77.0.2/24", "dev", "right0")
        run("ip", "-n", right, "link", "add", "dead0", "type", "veth", "peer", "name", "dead1")
        run("ip", "-n", right, "addr", "add", "10.88.0.2/24", "dev", "dead0")
        for host, device in (
            (left, "left0"),
            (right, "right0"),
            (right, "dead0"),
            (left, "lo"),
            (right, "lo"),
        ):
            run("ip", "-n", host, "link", "set", device, "up")
        yield left, right
    finally:
        for host in (left, right):
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


REDUCE = """
import os, sys
from trainsys.failure import guard
from trainsys.launch.network import settings
with guard():
    settings("10.77.0.1", 29611, os.environ.get("TRAINSYS_INTERFACE"), os.environ)
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    x = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(x)
    print(os.environ["GLOO_SOCKET_IFNAME"], x.item(), flush=True)
"""


def host(namespace: str, rank: int, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", REDUCE],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timing
def test_two_hosts_meet_over_interfaces_of_different_names(two_hosts: tuple[str, str]) -> None:
    ranks = [host(name, rank) for rank, name in enumerate(two_hosts)]
    said = [rank.communicate(timeout=200) for rank in ranks]
    assert [out.split() for out, _ in said] == [["left0", "3.0"], ["right0", "3.0"]], said


@pytest.mark.timing
def test_the_wrong_interface_is_an_error_and_not_a_hang(two_hosts: tuple[str, str], tmp_path: Path) -> None:
    started = time.monotonic()
    agreed = str(tmp_path / "failure.json")
    with host(two_hosts[1], 1, TRAINSYS_INTERFACE="dead0", TRAINSYS_FAILURE_FILE=agreed) as rank:
        _, error = rank.communicate(timeout=120)
    assert rank.returncode == 75
    assert "interface dead0 (10.88.0.2): no answer from the head node at 10.77.0.1:29611" in error
    assert "the route leads over right0" in error
    assert time.monotonic() - started < 60
