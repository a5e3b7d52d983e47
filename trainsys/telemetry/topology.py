"""Where a host hangs in the network, as far as the scheduler tells the process."""

from __future__ import annotations

from collections.abc import Mapping


def switch_of(environ: Mapping[str, str]) -> str:
    """The host's leaf switch; empty where nobody tells.

    Slurm with a topology plugin: ``SLURM_TOPOLOGY_ADDR=core.leaf3.node17`` goes from the top switch to the node, and
    ``SLURM_TOPOLOGY_ADDR_PATTERN=switch.switch.node`` says what each part is (srun(1), output environment variables).
    """
    parts = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    switches = [name for name, kind in zip(parts, kinds, strict=False) if kind == "switch"]
    return switches[-1] if switches else ""
