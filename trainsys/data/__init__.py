"""Text and tokens into global batches: sources, tokenizers, token shards, packing, order and loader. No
torch."""

from trainsys.data.loader import Loader, StepData
from trainsys.data.packing import IGNORE, Batch, Counts
from trainsys.data.source import Source, build_source
from trainsys.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "Counts",
    "Loader",
    "Source",
    "StepData",
    "Tokenizer",
    "build_source",
    "load_tokenizer",
]
