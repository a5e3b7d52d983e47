"""DeepSpeed as the engine: our model, batches and answer, its ZeRO, pipeline and Ulysses.

See docs/engines-deepspeed.md.
"""

from trainsys.engines.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
