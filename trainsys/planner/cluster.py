"""A cluster: which device, how many share a fast domain, and the network each really has."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from trainsys.config.base import Strict
from trainsys.config.loader import load
from trainsys.config.root import config_root
from trainsys.errors import UserError
from trainsys.hardware import lookup
from trainsys.planner.machine import Machine, from_device, with_memory


class Cluster(Strict):
    """One file of ``configs/clusters``. Rates one way; Gbit/s as fabrics are sold."""

    name: str
    device: str = Field(description="catalogue name")
    gpus_per_node: PositiveInt
    nic_gbit_per_gpu: NonNegativeFloat = Field(
        description="network of one GPU; a node's is shared by its GPUs"
    )
    nvlink_domain: PositiveInt | None = Field(
        None, description="GPUs of one scale-up domain, if not one node"
    )
    usable_gib: PositiveFloat | None = Field(None, description="device memory, if not the catalogue's")
    nodes: PositiveInt | None = Field(None, description="size of the cluster; --gpus overrides it")
    mtbf_hours_per_node: PositiveFloat = Field(
        6_335.0,
        description="mean time between interruptions of one node; Llama 3's 419 unexpected ones in 54 days on 2,048 "
        "nodes (arXiv:2407.21783, section 3.3.4) are one in 6,335 node-hours",
    )
    checkpoint_gb_s: PositiveFloat = Field(2.0, description="GB/s of checkpoint written by one node")
    storage_gb_s: PositiveFloat = Field(
        2_000.0,
        description="GB/s that the shared storage takes from all nodes; Llama 3's sustained 2 TB/s (section 3.3.1)",
    )
    restart_s: PositiveFloat = Field(600.0, description="seconds from failure to the first new step")

    @property
    def domain(self) -> int:
        return self.nvlink_domain or self.gpus_per_node

    def machine(self) -> Machine:
        """Raises UserError for a device that the catalogue lacks."""
        made = from_device(
            lookup(self.device), nodes_domain=self.domain, nic_gb_s=max(self.nic_gbit_per_gpu, 0.01) / 8.0
        )
        return made if self.usable_gib is None else with_memory(made, self.usable_gib)


def known_clusters() -> list[str]:
    return sorted(p.stem for p in (config_root() / "clusters").glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """A file, or the name of one that comes with trainsys.

    Raises:
        UserError: no such cluster (says which there are), or a file that does not describe one.
    """
    path = Path(name)
    if not path.is_file():
        path = config_root() / "clusters" / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise UserError(f"--cluster {name}: no such file or cluster; there are {', '.join(known_clusters())}")
    return load(path, Cluster)
