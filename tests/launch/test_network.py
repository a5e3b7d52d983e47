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

from trainsys.errors import UserError
from trainsys.launch import network
from trainsys.launch.rank import prepare

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


def test_a_head_node_without_an_address_is_one_line() -> None:
    with pytest.raises(UserError, match=r"head node nowhere\.invalid: .* cannot resolve this name") as error:
        prepare(slurm_variables(SLURM_JOB_NODELIST="nowhere.invalid"))
    assert "\n" not in str(error.value)


def test_outside_of_srun() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID is not set"):
        prepare({})


def test_an_interface_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match=r"interface ib7: .* it has .*lo \(127\.0\.0\.1\)"):
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
from trainsys.launch.failure import guard
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
    assert rank.returncode == 2
    assert "interface dead0 (10.88.0.2): no answer from the head node at 10.77.0.1:29611" in error
    assert "the route leads over right0" in error
    assert time.monotonic() - started < 60
