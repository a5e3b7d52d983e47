"""Who is slow: the statistics, shared by traces and the live profiler. numpy only."""

from trainsys.profiler.straggler.group import LEAST_STEPS, Straggler
from trainsys.profiler.straggler.peers import median_of_others, median_where, peer_log_ratio, row_medians
from trainsys.profiler.straggler.stats import find_stragglers

__all__ = [
    "LEAST_STEPS", "Straggler", "find_stragglers", "median_of_others", "median_where", "peer_log_ratio", "row_medians",
]  # fmt: skip
