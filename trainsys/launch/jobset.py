"""The JobSet of a run, and what the end of a pod leads to.

Field names: https://github.com/kubernetes-sigs/jobset config/components/crd/bases (v1alpha2, release 0.12).
"""

from __future__ import annotations

from typing import Any

from trainsys.errors import EXIT_USER_ERROR
from trainsys.launch import pods
from trainsys.launch.job import Job
from trainsys.launch.node import EXIT_DRAINED
from trainsys.launch.pods import NODE

_PORT = 29500
_QUEUE = "kueue.x-k8s.io/queue-name"
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"


def job_set(job: Job) -> dict[str, Any]:
    launch, name = job.first.launch, job.unique_name
    port = launch.port or _PORT
    rendezvous = [
        {"name": "PET_NNODES", "value": str(job.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(job.ranks_per_node)},
        # Pods of an Indexed Job know their index; the JobSet makes a headless service that names them by it.
        {
            "name": "PET_NODE_RANK",
            "valueFrom": pods.field("metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        },
        {"name": "PET_MASTER_ADDR", "value": f"{name}-{NODE}-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(port)},
        attempt(),
    ]
    container = {
        "image": launch.container,
        "command": pods.command(job),
        "env": [*rendezvous, *pods.environment(job)],
        "ports": [{"containerPort": port}],
        "resources": pods.resources(job),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata(job, exclusive(job)),
        "spec": job_set_spec(job, container, {}, launch.time),
    }


def job_set_spec(
    job: Job, container: dict[str, Any], labels: dict[str, str], time: str | None
) -> dict[str, Any]:
    """One Job with a pod for each node, and what the end of a pod leads to.

    The ranks of a run live and die together, so a failed pod fails the Job, and the JobSet starts all pods anew. Its
    rules tell the reasons apart by the message that the Job controller writes (JobSet 0.10 or later).
    """
    kube = job.first.launch.kubernetes
    if kube.claim:
        container = {**container, "workingDir": kube.mount}
    template = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **({"activeDeadlineSeconds": seconds(time)} if time else {}),
        "podFailurePolicy": {
            "rules": [
                # Evicted, preempted, or moved by the JobSet controller itself: not the run's failure. The other pods
                # save and end with EXIT_DRAINED.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                *(_fail_job(code) for code in (EXIT_USER_ERROR, EXIT_DRAINED)),
            ]
        },
        "template": pods.template(job, container, whole=True),
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": job.first.launch.max_restarts,
            "rules": [
                _rule("mistake", "FailJobSet", EXIT_USER_ERROR),
                _rule("asked_to_stop", "RestartJobSetAndIgnoreMaxRestarts", EXIT_DRAINED),
                *(
                    [
                        {
                            "name": "deadline",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["DeadlineExceeded"],
                        }
                    ]
                    if time
                    else []
                ),
            ],
        },
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {**({"metadata": {"labels": labels}} if labels else {}), "spec": template},
            }
        ],
    }


def _fail_job(code: int) -> dict[str, Any]:
    return {
        "action": "FailJob",
        "onExitCodes": {"containerName": NODE, "operator": "In", "values": [code]},
    }


def _rule(name: str, action: str, code: int) -> dict[str, Any]:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"failed with exit code {code} matching"],
    }


def seconds(time: str) -> int:
    """``[days-]hours:minutes:seconds`` as seconds."""
    days, _, clock = time.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def metadata(job: Job, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    kube = job.first.launch.kubernetes
    return {
        "name": job.unique_name,
        "namespace": kube.namespace,
        "labels": {
            "app.kubernetes.io/managed-by": "trainsys",
            **({_QUEUE: kube.queue} if kube.queue else {}),
        },
        **({"annotations": annotations} if annotations else {}),
    }


def exclusive(job: Job) -> dict[str, str]:
    label = job.first.launch.kubernetes.topology.exclusive
    return {_EXCLUSIVE: label} if label else {}


def attempt() -> dict[str, Any]:
    """Pods of an attempt before must not meet those of this one."""
    source = pods.field("metadata.labels['jobset.sigs.k8s.io/restart-attempt']")
    return {"name": "PET_RDZV_ID", "valueFrom": source}
