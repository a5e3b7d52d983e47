"""What the product asks of NCCL's bindings, which only a CUDA build has."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.cuda_build


def test_the_library_and_its_options_are_there() -> None:
    assert dist.is_nccl_available()
    # `Mesh` splits the world where the backend can, which NCCL's says by this property.
    assert "supports_splitting" in dir(dist.ProcessGroupNCCL)
    assert dist.ProcessGroupNCCL.Options().backend == "nccl"


def test_groups_are_split_by_the_arguments_that_the_mesh_gives() -> None:
    given = inspect.signature(dist.split_group).parameters
    assert {"split_ranks", "timeout", "group_desc"} <= set(given)
    assert "device_id" in inspect.signature(dist.init_process_group).parameters


def test_the_recorder_is_dumped_by_its_own_call_and_read_by_the_product(tmp_path: Path) -> None:
    from torch._C import _distributed_c10d as c10d

    from trainsys.resilience.flight import _CALLS, read_state

    path = tmp_path / "rank_00000.flight.pickle"
    path.write_bytes(getattr(c10d, _CALLS["nccl"])())
    assert {"version", "pg_config"} <= set(pickle.loads(path.read_bytes()))
    state = read_state(path)
    assert state is not None
    assert (state.doing, state.last) == ("", ""), "nothing was ever enqueued"


def test_without_a_device_the_build_says_so() -> None:
    """Else the other tests of this folder have not seen what they are for."""
    if torch.cuda.is_available():
        pytest.skip("there is a device: the gpu tests say more")
    assert torch.backends.cuda.is_built()
