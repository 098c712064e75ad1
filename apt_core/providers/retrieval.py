"""Providers of retrieval over text (kind ``retrieval``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from apt_core.providers.base import Provider


@dataclass(frozen=True)
class RetrievedChunk:
    """A piece of text that was found: where it is from, and how well it fits (higher is better)."""

    text: str
    source: str
    score: float


class RetrievalProvider(Provider, ABC):
    """Indexes chunks of text and finds those that fit a query."""

    @abstractmethod
    def build(self, chunks: Sequence[str], sources: Sequence[str]) -> None:
        """Index ``chunks``; ``sources`` names the origin of each, and is as long."""

    @abstractmethod
    def search(self, query: str, k: int = 5) -> list[RetrievedChunk]:
        """The best ``k`` chunks (fewer, if there are fewer), best first, ties by index order."""
