"""Predict step time and memory of any layout on any cluster, search the layouts, and be checked against
published runs. numpy over arrays of layouts; no torch."""
