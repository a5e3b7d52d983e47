"""Pipeline parallelism: stages of layers on different ranks, run in the order that `trainsys.schedules` gives.

Not on ``torch.distributed.pipelining``: see docs/pipeline-parallel.md for what replaces what of it, and why.
Its orders are what ours are tested against.
"""
