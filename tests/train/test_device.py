"""What ``train.device`` and ``train.attention`` ask of a machine."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainsys.blame import BLAME_FILE, Blame, read
from trainsys.config.run import TrainConfig
from trainsys.errors import MachineFault, UserError
from trainsys.train import process as module
from trainsys.train.process import choose_device, process, raise_file_limit


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_GPUS_PER_TASK", "SLURM_STEP_GPUS", "SLURM_PROCID", "TRAINSYS_RUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_cuda")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device(TrainConfig(), 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"train\.device=cuda, but torch finds no CUDA device; use"):
        choose_device(TrainConfig(device="cuda"), 0)


@pytest.mark.usefixtures("without_cuda")
def test_flex_attention_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(UserError, match=r"train\.attention=flex on the CPU: .* use train\.attention=auto"):
        choose_device(TrainConfig(attention="flex"), 0)


def test_a_node_with_fewer_gpus_than_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(TrainConfig(attention="flex"), 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this node shows 2; start at most 2"):
        choose_device(TrainConfig(), 2)


def test_on_cuda_the_default_group_is_nccl_alone_bound_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(module, "Ranks", lambda timeout_s: type("Alone", (), {"close": lambda self: None})())
    for name in ("TORCH_GLOO_LAZY_INIT", "TORCH_FR_BUFFER_SIZE"):  # as they were, afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"RANK": 3, "WORLD_SIZE": 16, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    with process(TrainConfig(), timeout_s=77.0) as proc:
        assert proc.device == torch.device("cuda", 3)
    ((args, how),) = asked
    assert args == ("nccl",), "a gloo group beside it would hold a socket to every rank"
    assert how["device_id"] == torch.device("cuda", 3)
    assert how["timeout"].total_seconds() == 77.0
    assert os.environ["TORCH_GLOO_LAZY_INIT"] == "1"


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(900, before[1]), before[1]))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("shown", "local_rank"), [(0, 0), (7, 7)])
def test_in_a_job_a_node_that_lost_its_gpu_is_at_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: int, local_rank: int
) -> None:
    """The job asked for nodes with devices: it is started again without this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: shown > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    monkeypatch.setenv(BLAME_FILE, str(tmp_path / "blamed.jsonl"))
    says = f"{shown} CUDA devices visible to its 8 ranks"
    with pytest.raises(MachineFault, match=f"^node n3: {says}$"):
        choose_device(TrainConfig(device="cuda"), local_rank, 8)
    assert read(tmp_path / "blamed.jsonl") == [Blame("n3", says, True, 0)]


@pytest.mark.parametrize(
    "variables",
    [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_PROCID": "3", "SLURM_STEP_GPUS": "0,1,2,3"}],
    ids=["--gpus-per-task", "--gpu-bind"],
)
def test_the_only_device_that_slurm_shows_a_rank_is_its_own(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"SLURM_JOB_ID": "7", **variables}.items():
        monkeypatch.setenv(name, value)
    assert choose_device(TrainConfig(), 3, 4) == torch.device("cuda", 0)


def test_ranks_that_cannot_reach_each_other_are_a_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    says = f"^rank 1 on n3 cannot reach the others at 127.0.0.1:{port}: "
    with (
        pytest.raises(MachineFault, match=says) as fault,
        process(TrainConfig(device="cpu", threads=1), timeout_s=1.0),
    ):
        pass
    assert "\n" not in str(fault.value)
    assert isinstance(fault.value.__cause__, torch.distributed.DistError), (
        "so peers of the one at fault wait for it"
    )
