"""What ``train.device`` and ``train.attention`` ask of a machine."""

from __future__ import annotations

import pytest
import torch

from trainsys.config.run import TrainConfig
from trainsys.errors import UserError
from trainsys.train.process import choose_device


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
