"""Traces whose what-ifs are known, because the program that made them can be run again with the change."""
