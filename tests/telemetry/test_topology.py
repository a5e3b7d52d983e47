"""The leaf switch out of what Slurm says."""

import pytest

from trainsys.telemetry.topology import switch_of


@pytest.mark.parametrize(
    ("address", "pattern", "switch"),
    [
        ("core.leaf3.node17", "switch.switch.node", "leaf3"),
        ("leaf1.node2", "switch.node", "leaf1"),
        ("node2", "node", ""),
        ("", "", ""),
    ],
)
def test_the_leaf_switch(address: str, pattern: str, switch: str) -> None:
    environ = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert switch_of(environ) == switch
    assert switch_of({}) == ""
