"""What a step copies from the host does not make the host wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainsys.config.loader import load_run
from trainsys.data.packing import Batch, Counts
from trainsys.models import rope
from trainsys.models.decoder import Decoder
from trainsys.ops.host_copy import to_device
from trainsys.parallel.pipeline.stage import Inputs


def test_on_cpu_nothing_is_copied() -> None:
    x = torch.arange(4)
    assert to_device(x, torch.device("cpu")) is x


def test_inputs_of_a_step_are_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[bool, bool]] = []
    pinned: set[int] = set()

    def pin(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        pinned.add(out.data_ptr())
        return out

    def to(x: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        assert device.type == "cuda"
        copies.append((x.data_ptr() in pinned, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    row = np.zeros((1, 8), np.int64)
    Inputs.of(Batch(row, row, row, row, Counts()), torch.device("cuda", 0))
    assert copies == [(True, True)] * 3  # documents stay on the host


def test_only_the_first_forward_sends_the_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = rope.frequencies
    monkeypatch.setattr("trainsys.models.decoder.frequencies", lambda *a: made.append(1) or real(*a))
    monkeypatch.setattr(rope, "frequencies", lambda *a: made.append(2) or real(*a))
    model = Decoder(load_run("train/demo").model)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        first = model(tokens, torch.arange(8)[None])
        assert torch.equal(model(tokens, torch.arange(8)[None]), first)
    assert made == [1]
    assert "freqs" not in " ".join(model.state_dict())
