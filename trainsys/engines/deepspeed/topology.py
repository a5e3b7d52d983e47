"""Our mesh as the ``mpu`` that DeepSpeed asks who shares what."""

from __future__ import annotations

from typing import Any

from trainsys.comm.group import AxisGroup
from trainsys.parallel.mesh import Mesh


class Topology:
    """Data ranks read different rows, sequence ranks share one (its Ulysses), model ranks share a layer.

    It knows a group of one only as a group, so there is one for this rank alone. Every rank must make it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._alone = mesh.alone()
        # The data ranks are either dp_replicate or dp_shard, never both.
        self._data = mesh["dp_replicate"] if mesh.layout.dp_replicate > 1 else mesh.join("dp_shard")
        self._state = mesh.join("loss") if mesh.layout.dp_replicate > 1 else mesh["fsdp"]

    def _group(self, axis: AxisGroup) -> Any:
        return axis.group or self._alone

    # ---- ranks that read different rows ----

    def get_data_parallel_group(self) -> Any:
        return self._group(self._data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._data.ranks)

    def get_data_parallel_rank(self) -> int:
        return self._data.index

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    # ---- ranks that share one row ----

    def get_sequence_parallel_group(self) -> Any:
        return self._group(self._mesh["cp"])

    def get_sequence_parallel_rank(self) -> int:
        return self._mesh["cp"].index

    def get_sequence_parallel_world_size(self) -> int:
        return self._mesh["cp"].size

    # ---- both: over these ZeRO shards, and gradients are reduced ----

    def get_sequence_data_parallel_group(self) -> Any:
        return self._group(self._state)

    def get_sequence_data_parallel_rank(self) -> int:
        return self._state.index

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._state.size

    # ---- ranks that share a layer ----

    def get_model_parallel_group(self) -> Any:
        return self._group(self._mesh["tp"])

    def get_model_parallel_rank(self) -> int:
        return self._mesh["tp"].index

    def get_model_parallel_world_size(self) -> int:
        return self._mesh["tp"].size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
