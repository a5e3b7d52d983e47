"""The ``launch.kubernetes:`` section of a RUN.yaml: what pods are given, and where they are placed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trainsys.config.base import Name, Plain, Strict


class Toleration(Strict):
    """As Kubernetes writes it: a taint that the pods may be placed in spite of."""

    key: Plain | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: Plain | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: NonNegativeInt | None = Field(default=None, description="NoExecute: how long; None: for ever")


class Topology(Strict):
    """Where the pods of a job are placed relative to each other. Each value is the key of a node label."""

    exclusive: Plain | None = Field(
        default=None, description="all in one domain of this label, which no other job uses (JobSet)"
    )
    required: Plain | None = Field(
        default=None, description="all in one domain of this label, or the job waits (Kueue)"
    )
    preferred: Plain | None = Field(default=None, description="in as few domains as can be (Kueue)")
    spread: Plain | None = Field(
        default=None, description="evenly over the domains of this label, e.g. kubernetes.io/hostname"
    )


class Volume(Strict):
    """One volume of every pod; of ``claim``, ``host_path`` and ``memory`` one is set."""

    path: Annotated[str, Field(pattern=r"^/[^\n\r]*$")] = Field(description="where the pods see it")
    claim: Plain | None = Field(default=None, description="persistent volume claim")
    host_path: Plain | None = Field(default=None, description="folder of the node")
    memory: Plain | None = Field(default=None, description="a file system in memory of this size, e.g. 64Gi")
    read_only: bool = False

    @model_validator(mode="after")
    def _check(self) -> Volume:
        given = [name for name in ("claim", "host_path", "memory") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"volume at {self.path}: one of claim, host_path and memory is needed, not {len(given)}"
            )
        return self


class SecretKey(Strict):
    """A key of a Secret of the namespace."""

    name: Plain
    key: Plain


class KubernetesConfig(Strict):
    """What only Kubernetes needs; see docs/kubernetes.md."""

    kind: Literal["trainjob", "jobset"] = Field(
        default="trainjob", description="TrainJob of Kubeflow Trainer v2, or a JobSet alone"
    )
    namespace: Plain = "default"
    runtime: Plain | None = Field(
        default=None,
        description="trainjob: a ClusterTrainingRuntime of the cluster; None: a TrainingRuntime is written for the job",
    )
    queue: Plain | None = Field(default=None, description="Kueue's local queue")
    claim: Plain | None = Field(
        default=None, description="persistent volume claim, seen by all nodes, for checkpoints and logs"
    )
    mount: Plain = Field(
        default="/workspace", description="where the claim is mounted, and the working folder"
    )
    volumes: tuple[Volume, ...] = Field(default=(), description="further volumes, such as one with data")
    shm: Plain | None = Field(
        default=None, description="size of /dev/shm, e.g. 64Gi; None: what the pod may use"
    )
    cpu: PositiveInt | None = Field(
        default=None, description="cores a node; None: launch.cpus_per_rank of each rank"
    )
    memory: Plain | None = Field(default=None, description="memory a node, e.g. 256Gi; None: launch.memory")
    device: Plain = Field(default="nvidia.com/gpu", description="the resource that a device is")
    resources: dict[str, str] = Field(
        default={},
        description="further resources a node, e.g. {rdma/hca: '8'} or {vpc.amazonaws.com/efa: '32'}",
    )
    node_selector: dict[str, str] = Field(default={}, description="labels that a node must have")
    affinity: dict[str, Any] = Field(default={}, description="as in a pod: nodeAffinity and the like")
    tolerations: tuple[Toleration, ...] = ()
    topology: Topology = Topology()
    capabilities: tuple[Plain, ...] = Field(
        default=(), description="Linux capabilities of the container; RDMA needs IPC_LOCK"
    )
    security_context: dict[str, Any] = Field(
        default={}, description="of the pod: runAsUser, fsGroup and the like"
    )
    service_account: Plain | None = None
    image_pull_secrets: tuple[Plain, ...] = ()
    priority_class: Plain | None = None
    secrets: dict[Name, SecretKey] = Field(
        default={},
        description="variables of every rank that come from Secrets: {WANDB_API_KEY: {name: wandb, key: api}}",
    )
    patch: dict[str, dict[str, Any]] = Field(
        default={},
        description="merged into the manifest last, by kind: {JobSet: {...}}, or {Pod: {...}} for the pod template",
    )

    @model_validator(mode="after")
    def _check(self) -> KubernetesConfig:
        if self.kind == "jobset" and self.runtime is not None:
            raise ValueError(
                f"runtime={self.runtime!r}: a JobSet has none; leave it out, or set kind=trainjob"
            )
        return self
