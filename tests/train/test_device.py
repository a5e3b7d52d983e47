"""What ``train.device`` and ``train.attention`` ask of a machine."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainsys.config.run import TrainConfig
from trainsys.errors import UserError
from trainsys.train import process as module
from trainsys.train.process import choose_device, process, raise_file_limit


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
