"""Who is slow: the statistics, shared by traces and the live profiler. numpy only."""

from trainsys.profiler.straggler.stats import Straggler, find_stragglers, peer_log_ratio, row_medians

__all__ = ["Straggler", "find_stragglers", "peer_log_ratio", "row_medians"]
