"""What the pods of a run are given, whatever object of Kubernetes makes them: variables, resources, volumes, places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainsys.config.secrets import is_secret
from trainsys.errors import UserError
from trainsys.launch.check import mounted
from trainsys.launch.job import Job
from trainsys.launch.manifest import config_text
from trainsys.launch.patch import merge

NODE = "node"
"""Name of the replicated job and of its container, as Kubeflow Trainer expects them."""
_TOPOLOGY = "kueue.x-k8s.io/podset-{}-topology"
_UNITS = {"": "Mi", "K": "Ki", "M": "Mi", "G": "Gi", "T": "Ti"}
_SAVE_S = 30
"""Beyond ``resilience.grace_s``, after which the process itself ends."""


def environment(job: Job) -> list[dict[str, Any]]:
    """Variables of the container. UserError for a secret whose value the manifest would show."""
    launch = job.first.launch
    for name, value in launch.variables.items():
        if is_secret(name, value) or name in launch.kubernetes.secrets:
            raise UserError(
                f"launch.env.{name}: the manifest would show its value; make a Secret with `kubectl create secret "
                f"generic NAME --from-literal=KEY=…` and set launch.kubernetes.secrets.{name}={{name: NAME, key: KEY}}"
            )
    values = {**launch.variables, "TRAINSYS_RUN": config_text(job.first)}
    if launch.interface:
        values["TRAINSYS_INTERFACE"] = launch.interface
    return [
        *({"name": name, "value": value} for name, value in values.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}
            for name, secret in launch.kubernetes.secrets.items()
        ),
    ]


def field(path: str) -> dict[str, Any]:
    """A variable's source: a field of its own pod."""
    return {"fieldRef": {"fieldPath": path}}


def command(job: Job, cd: str | None = None) -> list[str]:
    """What the container runs, after ``launch.setup``. ``cd``: where, if the container cannot say it."""
    run = ["python", "-m", "trainsys.launch.node"]
    lines = [*([f"cd '{cd}'"] if cd else []), *job.first.launch.setup]
    return ["bash", "-ec", "\n".join([*lines, f"exec {' '.join(run)}"])] if lines else run


def resources(job: Job) -> dict[str, Any]:
    """Requests, equal to the limits: a pod that shares cores or memory slows all the others down."""
    launch, kube = job.first.launch, job.first.launch.kubernetes
    for option, general, own in (
        ("cpu", launch.cpus_per_rank, kube.cpu),
        ("memory", launch.memory, kube.memory),
    ):
        if general and own:
            raise UserError(
                f"launch.kubernetes.{option}={own}: launch.{'cpus_per_rank' if option == 'cpu' else option}={general} "
                "says it too; leave one out"
            )
    cpu = kube.cpu or (launch.cpus_per_rank or 0) * job.ranks_per_node
    amounts = {
        **({"cpu": str(cpu)} if cpu else {}),
        **({"memory": m} if (m := kube.memory or _quantity(launch.memory)) else {}),
        **({kube.device: str(job.ranks_per_node)} if job.on_devices else {}),
        **kube.resources,
    }
    return {"requests": amounts, "limits": dict(amounts)} if amounts else {}


def _quantity(memory: str | None) -> str | None:
    """Slurm's 200G is what Kubernetes calls 200Gi; without a unit it is megabytes."""
    if memory is None:
        return None
    number = memory.rstrip("KMGT")
    return number + _UNITS[memory[len(number) :]]


def template(job: Job, container: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The pod template around ``container``, which is completed. ``whole``: it is all that the pods are made of; else
    it patches a runtime of the cluster, which takes only some fields."""
    run, kube = job.first, job.first.launch.kubernetes
    mounts, volumes = _volumes(job)
    container = {
        "name": NODE,
        **container,
        "volumeMounts": mounts,
        **(
            {"securityContext": {"capabilities": {"add": list(kube.capabilities)}}}
            if kube.capabilities
            else {}
        ),
    }
    near = {
        _TOPOLOGY.format(how): label
        for how in ("required", "preferred")
        if (label := getattr(kube.topology, how))
    }
    spec = {
        **({"restartPolicy": "Never"} if whole else {}),
        "terminationGracePeriodSeconds": int(run.resilience.grace_s) + _SAVE_S,
        **({"serviceAccountName": kube.service_account} if kube.service_account else {}),
        **(
            {"imagePullSecrets": [{"name": n} for n in kube.image_pull_secrets]}
            if kube.image_pull_secrets
            else {}
        ),
        **({"priorityClassName": kube.priority_class} if kube.priority_class else {}),
        **({"nodeSelector": kube.node_selector} if kube.node_selector else {}),
        **({"affinity": kube.affinity} if kube.affinity else {}),
        **({"tolerations": list(_tolerations(job))} if kube.tolerations else {}),
        **({"topologySpreadConstraints": [_spread(job)]} if kube.topology.spread else {}),
        **({"securityContext": kube.security_context} if kube.security_context else {}),
        "containers": [container],
        "volumes": volumes,
    }
    made = {**({"metadata": {"annotations": near}} if near else {}), "spec": spec}
    merged: dict[str, Any] = merge(made, kube.patch.get("Pod", {}))
    return merged


def _tolerations(job: Job) -> Iterator[dict[str, Any]]:
    for t in job.first.launch.kubernetes.tolerations:
        fields = {
            "key": t.key,
            "operator": t.operator if t.value is None else "Equal",
            "value": t.value,
            "effect": t.effect,
            "tolerationSeconds": t.seconds,
        }
        yield {name: value for name, value in fields.items() if value is not None}


def _spread(job: Job) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": job.first.launch.kubernetes.topology.spread,
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": job.unique_name}},
    }


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Mounts of the container, and the pod's volumes that they name."""
    kube = job.first.launch.kubernetes
    shm = {"medium": "Memory", **({"sizeLimit": kube.shm} if kube.shm else {})}
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": shm}]
    if kube.claim:
        mounts.append({"name": "work", "mountPath": kube.mount})
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": kube.claim}})
    for number, volume in enumerate(kube.volumes):
        name = f"volume-{number}"
        if volume.path in [m["mountPath"] for m in mounts]:
            raise UserError(f"launch.kubernetes.volumes: there are two volumes at {volume.path}")
        mounts.append(
            {"name": name, "mountPath": volume.path, **({"readOnly": True} if volume.read_only else {})}
        )
        if volume.claim:
            source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": volume.claim}}
        elif volume.host_path:
            source = {"hostPath": {"path": volume.host_path}}
        else:
            source = {"emptyDir": {"medium": "Memory", "sizeLimit": volume.memory}}
        volumes.append({"name": name, **source})
    return mounts, volumes


def keeps_checkpoints(job: Job) -> bool:
    """Whether the checkpoint folder is on a volume that outlives the pods."""
    kube = job.first.launch.kubernetes
    lasting = [v.path for v in kube.volumes if not v.memory and not v.read_only]
    own = [kube.mount] if kube.claim else []
    return mounted(job.first.checkpoint_folder, [*own, *lasting], kube.mount if kube.claim else None)
