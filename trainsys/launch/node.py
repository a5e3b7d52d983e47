"""What a pod or a virtual machine starts: torchrun's agent for this node's ranks, from PET_* variables.

Kubeflow's torch runtime, our JobSet and our SkyPilot file set PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and the
like, which torchrun reads by itself; TRAINSYS_RUN holds the config, so no volume is needed for it.

A drained run exits with 85, not with 0: a pod that ends with 0 is complete and is not started again. Nor with 75, a
machine's fault, which counts against launch.max_restarts.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from trainsys.config.loader import load_run
from trainsys.errors import UserError
from trainsys.failure import guard
from trainsys.launch.agent import pass_on, run_agent
from trainsys.launch.network import settings
from trainsys.launch.proof import MARKER

EXIT_DRAINED = 85
"""What HTCondor takes for "saved its state and is to be started again", and nothing else here exits with."""


def main() -> int:
    """Run this node's ranks to their end; the exit code."""
    with guard(), tempfile.TemporaryDirectory(prefix="trainsys-") as scratch:
        env = os.environ
        if "TRAINSYS_RUN" not in env:
            raise UserError("TRAINSYS_RUN is not set: it holds the run's config; see docs/kubernetes.md")
        file = Path(scratch) / "run.yaml"
        file.write_text(env["TRAINSYS_RUN"], encoding="utf-8")
        config = load_run(file)
        if int(env.get("PET_NNODES", "1").split(":")[0]) > 1:
            head, port = env.get("PET_MASTER_ADDR"), int(env.get("PET_MASTER_PORT", "29500"))
            if head is None:
                raise UserError("PET_MASTER_ADDR is not set: with PET_NNODES > 1 it names the node of rank 0")
            own: dict[str, str] = {}
            settings(head, port, env.get("TRAINSYS_INTERFACE"), own)
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                env.setdefault(name, own[name])
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        drained = Path(config.checkpoint_folder) / MARKER
        code = run_agent(
            ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", "-m", "trainsys", "train", str(file)],
            config.train.steps
            if env.get("PET_NODE_RANK", "0") == "0"
            else None,  # rank 0's node has the proof
            drained,
        ).code
        return EXIT_DRAINED if code == 0 and drained.exists() else code


if __name__ == "__main__":
    sys.exit(main())
