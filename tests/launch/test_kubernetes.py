"""Manifests for Kubernetes: valid against the CRDs with every field used, what restarts them, secrets, submission."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from trainsys.cli import main
from trainsys.config.launch import LaunchConfig
from trainsys.errors import EXIT_MACHINE_FAULT, EXIT_USER_ERROR, UserError
from trainsys.launch import job, kubernetes
from trainsys.launch.node import EXIT_DRAINED
from trainsys.launch.patch import merge

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.31"
IMAGE = "launch.container=registry.example/trainsys:0.1"
RUN = """
name: small
model: {n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab: 320, max_seq_len: 64}
train: {steps: 12, seq_len: 32, global_batch: 8, device: cuda}
data: {source: synthetic}
launch: {nodes: 2, devices_per_node: 2, container: registry.example/trainsys:0.1}
"""
# Every field of launch.kubernetes that both kinds have.
EVERYTHING = [
    "launch.cpus_per_rank=4",
    "launch.memory=100G",
    'launch.time="1:00:00"',
    "launch.setup=[ulimit -l unlimited]",
    "launch.interface=eth1",
    "launch.env.NCCL_DEBUG=WARN",
    "launch.kubernetes.namespace=research",
    "launch.kubernetes.queue=gpus",
    "launch.kubernetes.claim=work",
    "launch.kubernetes.mount=/shared",
    "launch.kubernetes.volumes=[{path: /data, claim: corpora, read_only: true}, {path: /scratch, host_path: /mnt/nvme}, "
    "{path: /fast, memory: 8Gi}]",
    "launch.kubernetes.shm=64Gi",
    "launch.kubernetes.device=amd.com/gpu",
    "launch.kubernetes.resources={vpc.amazonaws.com/efa: '32'}",
    "launch.kubernetes.node_selector={node.kubernetes.io/instance-type: p5.48xlarge}",
    "launch.kubernetes.affinity={nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: "
    "[{matchExpressions: [{key: kubernetes.io/hostname, operator: NotIn, values: [bad-node]}]}]}}}",
    "launch.kubernetes.tolerations=[{key: nvidia.com/gpu, effect: NoSchedule}, "
    "{key: node.kubernetes.io/unreachable, effect: NoExecute, seconds: 60}]",
    "launch.kubernetes.topology={exclusive: example.com/rack, required: example.com/block, preferred: example.com/rack}",
    "launch.kubernetes.capabilities=[IPC_LOCK, SYS_PTRACE]",
    "launch.kubernetes.security_context={runAsUser: 1000, fsGroup: 1000}",
    "launch.kubernetes.service_account=trainer",
    "launch.kubernetes.image_pull_secrets=[registry]",
    "launch.kubernetes.secrets={WANDB_API_KEY: {name: wandb, key: api-key}}",
    "launch.kubernetes.patch={Pod: {spec: {containers: [{name: node, volumeMounts: [{mountPath: /fast, subPath: a}]}]}}}",
]
WHOLE = [
    *EVERYTHING,
    "launch.kubernetes.priority_class=high",
    "launch.kubernetes.topology.spread=example.com/rack",
]
PORT = ["launch.kubernetes.kind=jobset", "launch.port=12345"]
NAMED = ["launch.kubernetes.runtime=torch-distributed"]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(*overrides: str) -> dict[str, Any]:
    """What is rendered, by kind, each checked against its CRD."""
    found = {}
    for document in yaml.safe_load_all(kubernetes.render(job.make("run.yaml", overrides))):
        schema = json.loads((SCHEMAS / f"{document['kind'].lower()}.json").read_text())
        jsonschema.validate(document, schema)
        found[document["kind"]] = document
    return found


def inner_job(*overrides: str) -> dict[str, Any]:
    """The Job that holds the pods, checked by Kubernetes' own schema; completed as Kubeflow Trainer does."""
    made = documents(*overrides)
    if "JobSet" in made:
        spec = made["JobSet"]["spec"]
    else:
        spec = made["TrainingRuntime"]["spec"]["template"]["spec"]
        trainer = made["TrainJob"]["spec"]["trainer"]
        container = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        container |= {"env": trainer["env"], "command": trainer["command"]}
        container["resources"] = trainer["resourcesPerNode"]
    (replicated,) = spec["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate({**whole, "metadata": {"name": "x"}}, KUBERNETES, strict=True)
    found: dict[str, Any] = replicated["template"]["spec"]
    return found


def pod_of(*overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = inner_job(*overrides)["template"]
    return found


@pytest.mark.parametrize("kind", [PORT, []], ids=["jobset", "trainjob"])
def test_every_field_of_a_pod_is_where_the_crd_wants_it(kind: list[str]) -> None:
    pod = pod_of(*WHOLE, *kind)
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert pod["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-required-topology": "example.com/block",
        "kueue.x-k8s.io/podset-preferred-topology": "example.com/rack",
    }
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert "nodeAffinity" in spec["affinity"]
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {
            "key": "node.kubernetes.io/unreachable",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": 60,
        },
    ]
    assert spec["topologySpreadConstraints"][0]["topologyKey"] == "example.com/rack"
    assert spec["securityContext"] == {"runAsUser": 1000, "fsGroup": 1000}
    assert (spec["serviceAccountName"], spec["priorityClassName"]) == ("trainer", "high")
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK", "SYS_PTRACE"]}}
    amounts = {"cpu": "8", "memory": "100Gi", "amd.com/gpu": "2", "vpc.amazonaws.com/efa": "32"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert container["command"] == ["bash", "-ec", "ulimit -l unlimited\nexec python -m trainsys.launch.node"]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert env["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert (env["NCCL_DEBUG"], env["TRAINSYS_INTERFACE"]) == ("WARN", "eth1")
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    volumes = {v.pop("name"): v for v in spec["volumes"]}
    assert {path: volumes[m["name"]] for path, m in mounts.items()} == {
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
        "/shared": {"persistentVolumeClaim": {"claimName": "work"}},
        "/data": {"persistentVolumeClaim": {"claimName": "corpora"}},
        "/scratch": {"hostPath": {"path": "/mnt/nvme"}},
        "/fast": {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    }
    assert mounts["/data"]["readOnly"] is True
    assert mounts["/fast"]["subPath"] == "a"
    assert container["workingDir"] == "/shared"


def test_objects_around_the_pods() -> None:
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "example.com/rack"}
    made = documents(*WHOLE, *PORT)["JobSet"]
    assert made["metadata"]["annotations"] == exclusive
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["metadata"]["namespace"] == "research"
    assert inner_job(*WHOLE, *PORT)["activeDeadlineSeconds"] == 3600
    (container,) = pod_of(*WHOLE, *PORT)["spec"]["containers"]
    assert {"name": "PET_MASTER_PORT", "value": "12345"} in container["env"]
    both = documents(*WHOLE)
    assert both["TrainJob"]["spec"]["activeDeadlineSeconds"] == 3600
    assert both["TrainingRuntime"]["spec"]["template"]["metadata"]["annotations"] == exclusive
    assert both["TrainJob"]["spec"]["runtimeRef"]["name"] == both["TrainingRuntime"]["metadata"]["name"]


def test_a_trainjob_patches_the_runtime_that_it_names() -> None:
    train_job = documents(*EVERYTHING, *NAMED)["TrainJob"]["spec"]
    assert train_job["runtimeRef"]["kind"] == "ClusterTrainingRuntime"
    (patch,) = train_job["runtimePatches"]
    # The admission webhook takes a name with a domain only.
    assert re.fullmatch(r"[a-z.]+/[a-z]+", patch["manager"])
    changed = patch["trainingRuntimeSpec"]["template"]
    assert "exclusive-topology" in str(changed["metadata"]["annotations"])
    pod = changed["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    # Its webhook refuses variables here; they are the trainer's.
    assert "env" not in container
    assert [m["mountPath"] for m in container["volumeMounts"]] == [
        "/dev/shm",
        "/shared",
        "/data",
        "/scratch",
        "/fast",
    ]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 90
    assert train_job["trainer"]["command"][2].startswith("cd '/shared'\nulimit")


@pytest.mark.parametrize(
    "asked",
    [
        "launch.max_restarts=7",
        "launch.kubernetes.priority_class=high",
        "launch.kubernetes.topology.spread=zone",
    ],
)
def test_what_only_the_runtime_can_say_is_refused_for_one_of_the_cluster(asked: str) -> None:
    documents(asked)
    with pytest.raises(UserError, match=f"{asked.split('=')[0]}: it is the runtime's"):
        documents(asked, *NAMED)


def test_a_misspelt_field_is_refused_by_the_schemas() -> None:
    for kind in ("JobSet", "TrainJob", "TrainingRuntime"):
        document = documents(*PORT) if kind == "JobSet" else documents()
        document[kind]["spec"]["replicas"] = 8
        with pytest.raises(jsonschema.ValidationError, match="replicas"):
            jsonschema.validate(document[kind], json.loads((SCHEMAS / f"{kind.lower()}.json").read_text()))


def outcome(
    spec: dict[str, Any], code: int | None, conditions: tuple[str, ...] = (), reason: str = ""
) -> str:
    """What becomes of a JobSet, one pod of which has failed so: the Job controller, then the JobSet controller.

    Messages are those of Kubernetes' pkg/controller/job/pod_failure_policy.go; a rule of a JobSet applies where one
    reason and one pattern fit.
    """
    message = "Job has reached the specified backoff limit"
    found = "BackoffLimitExceeded"
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    for index, rule in enumerate(rules):
        exits, on = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        fits = code in exits["values"] if exits else any(c["type"] in conditions for c in on)
        if fits and rule["action"] == "Ignore":
            return "pod replaced"
        if fits and rule["action"] == "FailJob":
            found = "PodFailurePolicy"
            message = f"Container node for pod default/x failed with exit code {code} "
            message += f"matching FailJob rule at index {index}"
            break
    found = reason or found
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [])
        if found in rule["onJobFailureReasons"] and (
            not patterns or any(re.search(p, message) for p in patterns)
        ):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize("kind", [["launch.kubernetes.kind=jobset"], []], ids=["jobset", "trainjob"])
def test_only_failures_count_against_max_restarts(kind: list[str]) -> None:
    made = documents(*kind, "launch.max_restarts=5")
    spec = made["JobSet"]["spec"] if kind else made["TrainingRuntime"]["spec"]["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    assert spec["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0
    assert outcome(spec, EXIT_USER_ERROR) == "FailJobSet"
    assert outcome(spec, EXIT_DRAINED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(spec, EXIT_DRAINED, ("DisruptionTarget",)) == "pod replaced"
    assert outcome(spec, 143, ("DisruptionTarget",)) == "pod replaced"
    for code in (1, EXIT_MACHINE_FAULT, 137, 22, 20):
        assert outcome(spec, code) == "RestartJobSet"


def test_a_deadline_ends_the_job() -> None:
    spec = documents("launch.kubernetes.kind=jobset", 'launch.time="0:10:00"')["JobSet"]["spec"]
    assert outcome(spec, None, reason="DeadlineExceeded") == "FailJobSet"


def test_drained_is_no_other_end() -> None:
    assert len({0, 1, EXIT_USER_ERROR, EXIT_MACHINE_FAULT, EXIT_DRAINED}) == 5


def test_a_patch_is_laid_over_last() -> None:
    made = documents(
        "launch.kubernetes.kind=jobset",
        "launch.kubernetes.patch={JobSet: {spec: {ttlSecondsAfterFinished: 60, failurePolicy: {maxRestarts: 9}}}, "
        "Pod: {metadata: {labels: {team: a}}, spec: {hostNetwork: true, restartPolicy: null, "
        "volumes: [{name: shm, $patch: delete}], "
        "containers: [{name: node, volumeMounts: [{mountPath: /dev/shm, $patch: delete}]}]}}}",
    )["JobSet"]["spec"]
    assert (made["ttlSecondsAfterFinished"], made["failurePolicy"]["maxRestarts"]) == (60, 9)
    assert len(made["failurePolicy"]["rules"]) == 2
    pod = made["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["labels"] == {"team": "a"}
    assert pod["spec"]["hostNetwork"] is True
    assert "restartPolicy" not in pod["spec"]
    assert pod["spec"]["volumes"] == []
    assert pod["spec"]["containers"][0]["image"] == "registry.example/trainsys:0.1"
    with pytest.raises(
        UserError, match=r"patch\.JobSet: the manifest has none; it has TrainingRuntime, TrainJob and Pod"
    ):
        documents("launch.kubernetes.patch={JobSet: {spec: {suspend: true}}}")


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 2, "d": 3}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({}, {"a": {"b": None, "c": 1}}, {"a": {"c": 1}}),
        ([1, 2], [3], [3]),
        ([{"name": "x", "v": 1}], [{"name": "y"}], [{"name": "x", "v": 1}, {"name": "y"}]),
        ([{"name": "x", "v": 1}], [{"name": "x", "w": 2}], [{"name": "x", "v": 1, "w": 2}]),
        ([{"key": "x"}], [{"key": "y"}], [{"key": "y"}]),
        ([{"name": "x"}], [{"name": "x", "$patch": "delete"}], []),
        ({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
)
def test_merge(base: Any, over: Any, merged: Any) -> None:
    before = json.dumps([base, over])
    assert merge(base, over) == merged
    assert json.dumps([base, over]) == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launch.container=null"], "launch.container: an image"),
        (
            ["launch.partition=gpu"],
            "launch.partition=gpu: Kubernetes .* does not use it; launch.kubernetes.queue",
        ),
        (
            ["launch.env.WANDB_API_KEY=abc"],
            "launch.env.WANDB_API_KEY: .*launch.kubernetes.secrets.WANDB_API_KEY=",
        ),
        (["launch.env.PROXY=http://me:pw@proxy"], "launch.env.PROXY: the manifest would show"),
        (["launch.env.A=b", "launch.kubernetes.secrets={A: {name: n, key: k}}"], "launch.env.A"),
        (
            [
                "launch.kubernetes.patch={Pod: {spec: {containers: [{name: node, env: [{name: A_TOKEN, value: b}]}]}}}"
            ],
            "the value of A_TOKEN",
        ),
        (
            ["launch.memory=1G", "launch.kubernetes.memory=1Gi"],
            "launch.kubernetes.memory=1Gi: launch.memory=1G says",
        ),
        (
            ["launch.cpus_per_rank=1", "launch.kubernetes.cpu=2"],
            "launch.kubernetes.cpu=2: launch.cpus_per_rank=1 says",
        ),
        (["launch.kubernetes.volumes=[{path: /dev/shm, memory: 1Gi}]"], "two volumes at /dev/shm"),
        (["launch.kubernetes.volumes=[{path: /a}]"], "one of claim, host_path and memory is needed, not 0"),
        (["launch.kubernetes.kind=jobset", *NAMED], "a JobSet has none"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        documents(*overrides)


@pytest.mark.parametrize(
    ("slurm", "kubernetes"),
    [("200G", "200Gi"), ("512", "512Mi"), ("4M", "4Mi"), ("9K", "9Ki"), ("1T", "1Ti")],
)
def test_memory_is_written_as_kubernetes_does(slurm: str, kubernetes: str) -> None:
    (container,) = pod_of(f'launch.memory="{slurm}"')["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == kubernetes


KUBECTL = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/calls"
name=$(grep -m1 '^  name:' "${@: -1}")
grep -qxF -- "$name" "$(dirname "$0")/names" 2>/dev/null && {
  echo 'Error from server (AlreadyExists): error when creating "job.yaml": jobsets "x" already exists' >&2
  exit 1
}
echo "$name" >> "$(dirname "$0")/names"
"""


def test_each_submission_is_a_job_of_its_own(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "bin").mkdir()
    (small / "bin/kubectl").write_text(KUBECTL)
    (small / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{small / 'bin'}:/usr/bin:/bin")
    command = ["launch", "run.yaml", "--on", "kubernetes", "launch.kubernetes.kind=jobset"]
    stamps = iter(["20260131-142501", "20260131-142502", "20260131-142502"])
    monkeypatch.setattr(job.time, "strftime", lambda *_: next(stamps))
    assert main(command) == 0
    assert main(command) == 0
    calls = (small / "bin/calls").read_text().splitlines()
    assert all(call.startswith("create -f ") for call in calls)
    names = {yaml.safe_load(Path(call.split()[-1]).read_text())["metadata"]["name"] for call in calls}
    assert names == {"small-20260131-142501", "small-20260131-142502"}
    assert "checkpoints go to runs/checkpoints/small, which is on no volume" in capsys.readouterr().err
    # Somebody else's job of this name, submitted from another folder in the same second.
    assert main([*command, "telemetry.out=elsewhere"]) == 2
    error = capsys.readouterr().err
    assert "kubectl: Error from server (AlreadyExists)" in error
    assert not list((small / "elsewhere").glob("jobs/*/job.json"))
    assert main(["jobs", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names)


def test_a_name_leaves_room_for_what_the_controllers_add() -> None:
    made = job.make("run.yaml", ["name=a" + "-very-long-name" * 9])
    # JobSet: name-node-0-INDEX and five more characters, in 63.
    assert len(f"{made.unique_name}-node-0-16383-abcde") <= 63


def test_a_checkpoint_folder_on_a_volume_is_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for override, warned in (
        ("launch.kubernetes.claim=work", False),
        ("launch.kubernetes.volumes=[{path: /ckpt, claim: c}]", True),
        ("launch.kubernetes.volumes=[{path: /ckpt, memory: 9Gi}]", True),
    ):
        assert main(["launch", "run.yaml", "--on", "kubernetes", "--dry-run", override]) == 0
        assert ("on no volume" in capsys.readouterr().err) == warned
    again = ["launch.kubernetes.volumes=[{path: /ckpt, claim: c}]", "checkpoint.folder=/ckpt/run"]
    assert main(["launch", "run.yaml", "--on", "kubernetes", "--dry-run", *again]) == 0
    assert capsys.readouterr().err == ""


def test_the_default_of_max_restarts_is_the_one_that_a_named_runtime_accepts() -> None:
    assert LaunchConfig().max_restarts == 3
    documents(*NAMED)


def test_the_page_shows_what_renders(small: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/kubernetes.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (small / f"{number}.yaml").write_text(f"include: run.yaml\n{block}")
    for run in ("0.yaml", "1.yaml"):
        for document in yaml.safe_load_all(
            kubernetes.render(
                job.make(
                    run,
                    [
                        "launch.kubernetes.kind=jobset",
                        "parallel.dp_shard=1",
                        "parallel.dp_replicate=-1",
                        "train.global_batch=128",
                    ],
                )
            )
        ):
            jsonschema.validate(document, json.loads((SCHEMAS / "jobset.json").read_text()))
