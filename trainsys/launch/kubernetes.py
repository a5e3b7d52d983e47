"""`trainsys launch --on kubernetes`: the manifest of a JobSet, or of a TrainJob with its runtime, and its submission."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from typing import Any

from trainsys.config.secrets import is_secret
from trainsys.errors import UserError
from trainsys.launch import job as jobs
from trainsys.launch import options, pods
from trainsys.launch.check import warn
from trainsys.launch.job import Job
from trainsys.launch.jobset import job_set
from trainsys.launch.manifest import dump
from trainsys.launch.patch import merge
from trainsys.launch.trainjob import train_job


def render(job: Job) -> str:
    """The manifest. UserError where Kubernetes cannot serve what ``launch:`` asks for."""
    run, kube = job.first, job.first.launch.kubernetes
    options.check(run, kube.kind)
    if not run.launch.container:
        raise UserError("launch.container: an image with trainsys in it is needed for --on kubernetes")
    _refuse_shown(kube.patch)
    documents = train_job(job) if kube.kind == "trainjob" else [job_set(job)]
    known = [document["kind"] for document in documents]
    for kind in kube.patch:
        if kind not in (*known, "Pod"):
            raise UserError(
                f"launch.kubernetes.patch.{kind}: the manifest has none; it has {', '.join(known)} and Pod"
            )
    return "---\n".join(dump(merge(d, kube.patch.get(d["kind"], {}))) for d in documents)


def _refuse_shown(patch: Any) -> None:
    """UserError for a secret that ``patch`` would write into the manifest."""
    if isinstance(patch, dict):
        if "value" in patch and is_secret(str(patch.get("name", "")), str(patch["value"])):
            raise UserError(
                f"launch.kubernetes.patch: the manifest would show the value of {patch['name']}; "
                f"set launch.kubernetes.secrets.{patch['name']}={{name: NAME, key: KEY}}"
            )
        patch = list(patch.values())
    if isinstance(patch, list):
        for inner in patch:
            _refuse_shown(inner)


def launch(job: Job, dry_run: bool) -> int:
    """Submit the manifest by kubectl; the exit code."""
    text = render(job)
    if dry_run:
        print(text, end="")
    else:
        # The image has the code. `create` refuses a name that exists, where `apply` would do nothing.
        path = jobs.write(replace(job, code=None), "job.yaml", text)
        submit(job, "kubernetes", ["kubectl", "create", "-f", str(path)])
    if not job.first.launch.kubernetes.runtime and not pods.keeps_checkpoints(job):
        warn(
            f"checkpoints go to {job.first.checkpoint_folder}, which is on no volume: pods that are started again begin "
            "at step 0; set launch.kubernetes.claim, or launch.kubernetes.volumes and checkpoint.folder on one"
        )
    return 0


def submit(job: Job, on: str, words: list[str], secrets: dict[str, str] | None = None) -> None:
    """Run a cluster's client on the written job file; UserError, one line, where it refuses.

    ``secrets``: variables that the client itself passes on to the ranks.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(secrets or {})})
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: not found on this machine; install it, or print the file with --dry-run"
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{words[0]}: {said[-1]}")
    jobs.record(job, on, job.unique_name)
    print(f"trainsys: {job.unique_name} submitted to {on}; the file is {words[-1]}")
