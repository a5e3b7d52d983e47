"""The ``launch:`` section of a RUN.yaml: what a scheduler is asked for, and what it does when a run ends early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr, model_validator

from trainsys.config.base import Name, Plain, Strict
from trainsys.config.kubernetes import KubernetesConfig


class Storage(Strict):
    """A bucket, as SkyPilot mounts it: see its file_mounts."""

    name: Plain | None = Field(default=None, description="a bucket of this name; made if there is none")
    source: Plain | None = Field(default=None, description="an existing bucket, e.g. s3://BUCKET/folder")
    store: Plain | None = Field(default=None, description="s3, gcs, azure, r2, …; None: that of the cloud")
    mode: Literal["MOUNT", "MOUNT_CACHED", "COPY"] = "MOUNT"

    @model_validator(mode="after")
    def _check(self) -> Storage:
        if self.name is None and self.source is None:
            raise ValueError("storage: a bucket's name, or a source such as s3://BUCKET, is needed")
        return self


Folder = Annotated[str, Field(pattern=r"^/[^\n\r]*[^/\n\r]$")]
"""A folder on a rented machine: an absolute path without a trailing slash."""


class SkyPilotConfig(Strict):
    """What only SkyPilot needs; see docs/skypilot.md."""

    accelerator: Plain | None = Field(
        default=None, description="e.g. H100; launch.devices_per_node of it a node"
    )
    infra: Plain | None = Field(default=None, description="e.g. aws/us-east-1; None: the cheapest")
    use_spot: bool = False
    storage: dict[Folder, Storage] = Field(
        default={},
        description="buckets by the folder where they are mounted: {/checkpoints: {name: my-bucket}}",
    )
    volumes: dict[Folder, Plain] = Field(
        default={}, description="SkyPilot's volumes by the folder where they are mounted: {/data: my-volume}"
    )


class LaunchConfig(Strict):
    """A job: how many nodes, for how long, in which environment, and how often it is started again."""

    nodes: PositiveInt = 1
    devices_per_node: PositiveInt | None = Field(
        default=None, description="ranks a node; None: what the layout fixes, else 8"
    )
    cpus_per_rank: PositiveInt | None = None
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = Field(
        default=None, description="memory a node as Slurm writes it, e.g. 200G"
    )
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] | None = Field(
        default=None, description="[days-]hours:minutes:seconds; None: the partition's"
    )
    warn_s: PositiveInt = Field(
        default=180, description="seconds before the time limit at which the run is told to save and end"
    )
    max_restarts: NonNegativeInt = Field(
        default=3,
        description="failures in a row, with no newer step saved in between, after which the run is started again; "
        "warnings and preemption are not counted",
    )
    retry_wait_s: NonNegativeInt = Field(
        default=60,
        description="pause before an attempt that follows a fault of no node in particular, as a full shared disk; "
        "twice as long after each further one",
    )
    array_limit: PositiveInt | None = Field(
        default=None, description="tasks of a grid or sweep that run at the same time; None: all"
    )
    account: Plain | None = None
    partition: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None
    reservation: Plain | None = None
    exclude: tuple[Plain, ...] = Field(default=(), description="nodes not to be used")
    sbatch: tuple[Plain, ...] = Field(
        default=(), description="further options of sbatch, e.g. --mail-type=END"
    )
    srun: tuple[Plain, ...] = Field(
        default=(), description="further options of srun, e.g. --distribution=block:block"
    )
    cpu_bind: Plain | None = Field(
        default=None, description="srun --cpu-bind; None: cores where devices are GPUs, else Slurm's own way"
    )
    gpu_bind: Plain | None = Field(
        default=None, description="srun --gpu-bind; None: none, so that ranks reach each other's devices"
    )
    venv: Plain | None = Field(default=None, description="virtual environment; None: the one that submits")
    python: Literal["host", "container"] | None = Field(
        default=None,
        description="with a container: whose Python the ranks run; None: the host's where launch.venv names one",
    )
    container: Plain | None = Field(
        default=None, description="image: by pyxis (srun --container-image), Kubernetes or SkyPilot"
    )
    mounts: tuple[Plain, ...] = Field(
        default=(), description="further folders of the host for pyxis, SRC:DST"
    )
    setup: tuple[Plain, ...] = Field(default=(), description="shell lines before the ranks, e.g. module load")
    env: dict[Name, SecretStr] = Field(
        default={}, description="variables of every rank; their values are never written into a run's files"
    )
    interface: Plain | None = Field(
        default=None, description="network interface of gloo and NCCL; None: the one that leads to rank 0"
    )
    port: int | None = Field(default=None, ge=1024, le=65535, description="None: from job id and attempt")
    snapshot: bool = Field(
        default=True, description="copy the code, so that a requeue runs what was submitted"
    )
    preflight: bool | None = Field(
        default=None, description="check all nodes first; None: where devices are GPUs"
    )
    cluster: Plain | None = Field(
        default=None,
        description="one of configs/clusters, or a file: launch checks that the run fits its devices, pre-flight expects "
        "its network",
    )
    evict_share: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="a node that slows all ranks by this share of a step is left: the run saves, and is requeued "
        "without it; 0: never",
    )
    kubernetes: KubernetesConfig = KubernetesConfig()
    skypilot: SkyPilotConfig = SkyPilotConfig()

    @property
    def variables(self) -> dict[str, str]:
        """``env`` in plain text, for what starts the ranks; never for a file that others can read."""
        return {name: value.get_secret_value() for name, value in self.env.items()}
