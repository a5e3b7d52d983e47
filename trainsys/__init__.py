"""trainsys: plan, launch, train and explain large-model training. Every FLOP accounted for."""

__version__ = "0.1.0"
