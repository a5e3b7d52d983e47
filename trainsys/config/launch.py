"""The ``launch:`` section of a RUN.yaml: what a scheduler is asked for, and what it does when a run ends early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from trainsys.config.base import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Plain = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
"""One line: these values become lines of a job file."""


class KubernetesConfig(Strict):
    """What only Kubernetes needs; see docs/kubernetes.md."""

    kind: Literal["trainjob", "jobset"] = Field(
        default="trainjob", description="TrainJob of Kubeflow Trainer v2, or a JobSet alone"
    )
    namespace: Plain = "default"
    runtime: Plain = Field(default="torch-distributed", description="trainjob: the ClusterTrainingRuntime")
    queue: Plain | None = Field(default=None, description="Kueue's local queue")
    claim: Plain | None = Field(
        default=None, description="persistent volume claim, seen by all nodes, for checkpoints and logs"
    )
    mount: Plain = Field(
        default="/workspace", description="where the claim is mounted, and the working folder"
    )
    cpu: PositiveInt | None = Field(default=None, description="cores a node")
    memory: Plain | None = Field(default=None, description="memory a node, e.g. 256Gi")
    device: Plain = Field(default="nvidia.com/gpu", description="the resource that a device is")


class SkyPilotConfig(Strict):
    """What only SkyPilot needs."""

    accelerator: Plain | None = Field(
        default=None, description="e.g. H100; launch.devices_per_node of it a node"
    )
    infra: Plain | None = Field(default=None, description="e.g. aws/us-east-1; None: the cheapest")
    use_spot: bool = False


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
    env: dict[Name, str] = Field(default={}, description="variables of every rank")
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
        default=None, description="one of configs/clusters, or a file: what pre-flight expects of the network"
    )
    evict_share: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="a node that costs everyone this share of a step is left: the run saves, and is requeued "
        "without it; 0: never",
    )
    kubernetes: KubernetesConfig = KubernetesConfig()
    skypilot: SkyPilotConfig = SkyPilotConfig()
