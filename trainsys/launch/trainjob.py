"""A TrainJob of Kubeflow Trainer v2, and the runtime that it runs in.

Field names: https://github.com/kubeflow/trainer manifests/base/crds (v1alpha1, release 2.3).
"""

from __future__ import annotations

from typing import Any

from trainsys.config.launch import LaunchConfig
from trainsys.errors import UserError
from trainsys.launch import pods
from trainsys.launch.job import Job
from trainsys.launch.jobset import attempt, exclusive, job_set_spec, metadata, seconds
from trainsys.launch.pods import NODE

_TRAINER = "trainer.kubeflow.org"
_MANAGER = "trainsys.dev/launch"
"""Owner of our entry of a TrainJob's runtimePatches: a name with a domain is asked for."""
_OF_A_RUNTIME = ("max_restarts", "kubernetes.priority_class", "kubernetes.topology.spread")
"""What a TrainJob cannot change of the runtime that it names."""


def train_job(job: Job) -> list[dict[str, Any]]:
    """The TrainJob, after the runtime that it runs in, unless one of the cluster is named."""
    launch, kube = job.first.launch, job.first.launch.kubernetes
    named = kube.runtime is not None
    kind = "ClusterTrainingRuntime" if named else "TrainingRuntime"
    cd = kube.mount if named and kube.claim else None
    spec = {
        "runtimeRef": {"apiGroup": _TRAINER, "kind": kind, "name": kube.runtime or job.unique_name},
        "trainer": {
            "image": launch.container,
            "command": pods.command(job, cd),
            "env": [*([] if named else [attempt()]), *pods.environment(job)],
            "numNodes": job.nodes,
            "numProcPerNode": job.ranks_per_node,
            **({"resourcesPerNode": r} if (r := pods.resources(job)) else {}),
        },
        **({"activeDeadlineSeconds": seconds(launch.time)} if launch.time else {}),
    }
    if named:
        spec["runtimePatches"] = [{"manager": _MANAGER, "trainingRuntimeSpec": _runtime_patch(job)}]
    document = {
        "apiVersion": f"{_TRAINER}/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": spec,
    }
    return [document] if named else [_runtime(job), document]


def _runtime(job: Job) -> dict[str, Any]:
    """A runtime of this job's own: what a TrainJob has no fields for, such as restarts, stands in it."""
    place = exclusive(job)
    label = {f"{_TRAINER}/trainjob-ancestor-step": "trainer"}
    return {
        "apiVersion": f"{_TRAINER}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata(job),
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                **({"metadata": {"annotations": place}} if place else {}),
                "spec": job_set_spec(job, {"image": job.first.launch.container}, label, None),
            },
        },
    }


def _runtime_patch(job: Job) -> dict[str, Any]:
    """What of a cluster's runtime a TrainJob may change."""
    launch, kube = job.first.launch, job.first.launch.kubernetes
    default = LaunchConfig.model_fields["max_restarts"].default
    asked = (launch.max_restarts != default, kube.priority_class, kube.topology.spread)
    for option, value in zip(_OF_A_RUNTIME, asked, strict=True):
        if value:
            raise UserError(
                f"launch.{option}: it is the runtime's, and {kube.runtime} is the cluster's; leave out "
                "launch.kubernetes.runtime, and a runtime is written for this job"
            )
    pod = pods.template(job, {}, whole=False)
    place = exclusive(job)
    return {
        "template": {
            **({"metadata": {"annotations": place}} if place else {}),
            "spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": pod}}}]},
        }
    }
