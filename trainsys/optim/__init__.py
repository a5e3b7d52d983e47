"""Optimizer on local shards, learning-rate schedule, and the global gradient norm."""
