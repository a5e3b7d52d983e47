"""The Megatron-Core engine; see docs/engines.md."""

import warnings

with warnings.catch_warnings():
    # At import it tells which optional kernels are absent; what is used instead is in docs/engines.md.
    warnings.simplefilter("ignore")
    from trainsys.engines.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
