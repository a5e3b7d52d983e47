"""Context parallelism without torch: who holds which tokens, what is refused, what is sent.

The planner, the layout and the runtime (`trainsys.parallel.context`) share this arithmetic.
"""
