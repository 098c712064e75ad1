"""Makes batches from text: loaders, tokenizers, order and windows."""

from apt_core.data.batches import IGNORED, Batch, BatchPlan, EvaluationPlan
from apt_core.data.preprocess import deduplicate_paragraphs, hold_out
from apt_core.data.tokenizer import ByteTokenizer
from apt_core.data.tokens import tokenize

__all__ = [
    "IGNORED",
    "Batch",
    "BatchPlan",
    "ByteTokenizer",
    "EvaluationPlan",
    "deduplicate_paragraphs",
    "hold_out",
    "tokenize",
]
