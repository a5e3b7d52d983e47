"""Tests of the CUDA build of torch, which needs no device: `launchers/test.sh --cuda-build` has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.version.cuda is not None:
        return
    skip = pytest.mark.skip(reason="torch here is a CPU build; launchers/test.sh --cuda-build brings a CUDA build")
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("cuda_build"):
            item.add_marker(skip)
