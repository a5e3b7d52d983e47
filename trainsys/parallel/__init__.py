"""Parallelism applied to plain modules from outside, by functions, in one order (see parallelize)."""
