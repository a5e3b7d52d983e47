"""Context parallelism: one sequence over the ranks of ``cp``, one file a flavour.

`core` puts a flavour under a model's attention; `blocks` is what the flavours have in common. Arithmetic
that needs no torch (who holds what, what is refused, bytes) is in :mod:`trainsys.context`.
"""
