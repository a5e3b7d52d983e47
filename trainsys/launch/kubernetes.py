"""`trainsys launch --on kubernetes`: a TrainJob of Kubeflow Trainer v2, or a JobSet where there is no Kubeflow.

Field names: https://github.com/kubeflow/trainer manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml (v1alpha1)
and https://github.com/kubernetes-sigs/jobset config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml (v1alpha2).
"""

from __future__ import annotations

import subprocess
from typing import Any

from trainsys.errors import EXIT_USER_ERROR, UserError
from trainsys.launch import job as jobs
from trainsys.launch.job import Job
from trainsys.launch.manifest import config_text, dns_name, dump, refuse_slurm

_COMMAND = ["python", "-m", "trainsys.launch.node"]
_PORT = 29500
_QUEUE = "kueue.x-k8s.io/queue-name"


def render(job: Job) -> str:
    """The manifest. UserError where Kubernetes cannot serve what ``launch:`` asks for."""
    launch = job.first.launch
    refuse_slurm(job.first, "Kubernetes", "setup")
    if not launch.container:
        raise UserError("launch.container: an image with trainsys in it is needed for --on kubernetes")
    document = _train_job(job) if launch.kubernetes.kind == "trainjob" else _job_set(job)
    return dump(document)


def _metadata(job: Job) -> dict[str, Any]:
    kube = job.first.launch.kubernetes
    labels = {"app.kubernetes.io/managed-by": "trainsys", **({_QUEUE: kube.queue} if kube.queue else {})}
    return {"name": dns_name(job.name), "namespace": kube.namespace, "labels": labels}


def _environment(job: Job) -> list[dict[str, Any]]:
    launch = job.first.launch
    values = {**launch.env, "TRAINSYS_RUN": config_text(job.first)}
    if launch.interface:
        values["TRAINSYS_INTERFACE"] = launch.interface
    return [{"name": name, "value": value} for name, value in values.items()]


def _resources(job: Job) -> dict[str, Any]:
    kube = job.first.launch.kubernetes
    amounts: dict[str, str] = {}
    if kube.cpu:
        amounts["cpu"] = str(kube.cpu)
    if kube.memory:
        amounts["memory"] = kube.memory
    devices = {kube.device: str(job.ranks_per_node)} if job.on_devices else {}
    return {"requests": {**amounts, **devices}, "limits": {**amounts, **devices}}


def _train_job(job: Job) -> dict[str, Any]:
    launch, kube = job.first.launch, job.first.launch.kubernetes
    if kube.claim:
        raise UserError(
            f"launch.kubernetes.claim={kube.claim}: a TrainJob takes its volumes from the runtime "
            f"{kube.runtime}; mount it there, or set launch.kubernetes.kind=jobset"
        )
    if launch.time:
        raise UserError("launch.time: set launch.kubernetes.kind=jobset for a deadline, or leave it out")
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": kube.runtime,
            },
            "trainer": {
                "image": launch.container,
                "command": _COMMAND,
                "env": _environment(job),
                "numNodes": job.nodes,
                "numProcPerNode": job.ranks_per_node,
                "resourcesPerNode": _resources(job),
            },
        },
    }


def _job_set(job: Job) -> dict[str, Any]:
    run, launch, kube = job.first, job.first.launch, job.first.launch.kubernetes
    name = dns_name(job.name)
    rendezvous = [
        {"name": "PET_NNODES", "value": str(job.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(job.ranks_per_node)},
        # Pods of an Indexed Job know their index; the JobSet makes a headless service that names them by it.
        {
            "name": "PET_NODE_RANK",
            "valueFrom": _field("metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        },
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(_PORT)},
        # Pods of an attempt before must not meet those of this one.
        {"name": "PET_RDZV_ID", "valueFrom": _field("metadata.labels['jobset.sigs.k8s.io/restart-attempt']")},
    ]
    container: dict[str, Any] = {
        "name": "train",
        "image": launch.container,
        "command": _COMMAND,
        "env": [*rendezvous, *_environment(job)],
        "ports": [{"containerPort": _PORT}],
        "resources": _resources(job),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if kube.claim:
        container["workingDir"] = kube.mount
        container["volumeMounts"].append({"name": "work", "mountPath": kube.mount})
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": kube.claim}})
    template = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **({"activeDeadlineSeconds": seconds(launch.time)} if launch.time else {}),
        # A mistake in the config fails alike the next time.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [EXIT_USER_ERROR]},
                }
            ]
        },
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": int(run.resilience.grace_s) + 30,
                "containers": [container],
                "volumes": volumes,
            }
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": template}}],
        },
    }


def _field(path: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": path}}


def seconds(time: str) -> int:
    """``[days-]hours:minutes:seconds`` as seconds."""
    days, _, clock = time.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def launch(job: Job, dry_run: bool) -> int:
    """Submit the manifest by kubectl; the exit code."""
    text = render(job)
    if dry_run:
        print(text, end="")
        return 0
    path = jobs.write(job, "job.yaml", text)
    command(job, "kubernetes", ["kubectl", "apply", "-f", str(path)])
    return 0


def command(job: Job, on: str, words: list[str]) -> None:
    """Run a cluster's client on the written job file; UserError, one line, where it refuses."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: not found on this machine; install it, or print the file with --dry-run"
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{words[0]}: {said[-1]}")
    jobs.record(job, on, dns_name(job.name))
    print(f"trainsys: {dns_name(job.name)} submitted to {on}; the file is {words[-1]}")
