"""What a provider of each kind must offer: one file a kind, and nothing here imports torch."""

from apt_core.providers.align import AlignProvider
from apt_core.providers.attention import AttentionProvider, AttentionSupport, DecodingCache
from apt_core.providers.backbone import BackboneProvider
from apt_core.providers.base import Provider
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.documents import Document, Message
from apt_core.providers.exporter import ExporterProvider, ExportJob, Proof
from apt_core.providers.ffn import FeedForwardProvider
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.providers.norm import NormProvider
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.providers.plain import (
    Beyond,
    PlainAttention,
    PlainBlock,
    PlainExperts,
    PlainFFN,
    PlainModel,
    PlainNorm,
    PlainRope,
    PlainRouter,
    PlainShape,
)
from apt_core.providers.position import PositionProvider
from apt_core.providers.retrieval import RetrievalProvider, RetrievedChunk
from apt_core.providers.router import RouterProvider
from apt_core.providers.task import (
    Choice,
    ChoiceTask,
    EncodedPassage,
    Passage,
    PassageTask,
    Question,
    QuestionTask,
    TaskProvider,
)
from apt_core.providers.tokenizer import Encoded, SpecialTokens, TokenizerProvider

__all__ = [
    "AlignProvider",
    "AttentionProvider",
    "AttentionSupport",
    "BackboneProvider",
    "Beyond",
    "Choice",
    "ChoiceTask",
    "DatasetProvider",
    "DecodingCache",
    "Document",
    "Encoded",
    "EncodedPassage",
    "ExportJob",
    "ExporterProvider",
    "FeedForwardProvider",
    "LRScheduleProvider",
    "Message",
    "NormProvider",
    "OptimizerProvider",
    "Passage",
    "PassageTask",
    "PlainAttention",
    "PlainBlock",
    "PlainExperts",
    "PlainFFN",
    "PlainModel",
    "PlainNorm",
    "PlainRope",
    "PlainRouter",
    "PlainShape",
    "PositionProvider",
    "Proof",
    "Provider",
    "Question",
    "QuestionTask",
    "RetrievalProvider",
    "RetrievedChunk",
    "RouterProvider",
    "SpecialTokens",
    "TaskProvider",
    "TokenizerProvider",
]
