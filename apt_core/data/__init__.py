"""Text to batches: tokenizers, loaders, order, windows."""

from apt_core.data.batches import IGNORED, Batch, BatchPlan, evaluation_batches
from apt_core.data.preprocess import deduplicate_paragraphs, hold_out
from apt_core.data.tokenizer import ByteTokenizer
from apt_core.data.tokens import tokenize

__all__ = [
    "IGNORED",
    "Batch",
    "BatchPlan",
    "ByteTokenizer",
    "deduplicate_paragraphs",
    "evaluation_batches",
    "hold_out",
    "tokenize",
]
