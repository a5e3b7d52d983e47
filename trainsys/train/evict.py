"""A node that the profiler blames: noted for the job, and left if it costs too much."""

from __future__ import annotations

from collections.abc import Sequence

from trainsys.blame import note
from trainsys.config.launch import LaunchConfig
from trainsys.profiler.verdict import Verdict
from trainsys.resilience.drain import Drain

_OF_A_NODE = ("rank", "node", "gc")


class Eviction:
    """Called with each verdict on rank 0. ``hosts[rank]`` is the scheduler's name of the rank's node;
    others need none."""

    def __init__(self, cfg: LaunchConfig, hosts: Sequence[str], drain: Drain) -> None:
        self._cfg, self._hosts, self._drain = cfg, hosts, drain

    def __call__(self, verdict: Verdict) -> None:
        """Note the node. Once it has cost ``evict_share`` of a step for long, the run saves and ends, to go on without
        it: a machine that others used for a while is not worth a restart."""
        if verdict.news == "over":
            return
        blamed = {self._hosts[rank] for rank in verdict.ranks}
        if verdict.kind not in _OF_A_NODE or len(blamed) != 1 or len(set(self._hosts)) == 1:
            return
        (host,) = blamed
        share = self._cfg.evict_share
        leave = verdict.news == "lasting" and 0.0 < share <= verdict.share
        note(host, verdict.title, sure=leave)
        if leave:
            self._drain.ask(f"{host}, which costs {100 * verdict.share:.0f}% of a step")
