"""Who is slow: the statistics, shared by traces and the live profiler. numpy only."""

from trainsys.profiler.straggler.stats import Straggler, find_slow_groups, find_stragglers, peer_log_ratio

__all__ = ["Straggler", "find_slow_groups", "find_stragglers", "peer_log_ratio"]
