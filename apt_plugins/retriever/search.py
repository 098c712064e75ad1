"""Providers of kind ``retrieval``: ``exact``, ``bm25``, ``faiss`` and ``fused``.

Shapes: N passages, D numbers a vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_core.providers import RetrievalProvider, RetrievedChunk
from apt_core.providers.base import read_settings
from apt_plugins.retriever.embedders import Embedder, embedder_called, unit, words_of
from apt_plugins.retriever.index import Index
from apt_plugins.retriever.matrix import Floats, Matrix
from apt_plugins.retriever.settings import SECTION, RetrieverSettings

RANK_OFFSET = 60
"""In reciprocal rank fusion (Cormack et al. 2009) the r-th of a list adds 1 / (60 + r)."""


class Search(RetrievalProvider):
    """Searches what was built of texts, or an index that is kept."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(RetrieverSettings, config, SECTION)
        self._text: Callable[[int], str] = lambda number: ""
        self._place: Callable[[int], str] = lambda number: ""
        self._size = 0

    def build(self, chunks: Sequence[str], sources: Sequence[str]) -> None:
        if len(chunks) != len(sources):
            raise ValueError(f"{len(chunks)} chunks have {len(sources)} sources")
        self._text, self._place, self._size = chunks.__getitem__, sources.__getitem__, len(chunks)
        if chunks:
            self.index_texts(chunks)

    def attach(self, index: Index) -> None:
        """Search the passages of ``index``, which keeps what is computed of them."""
        passages = index.passages
        self._text, self._place, self._size = passages.text, passages.place, len(passages)
        self.use(index)

    def search(self, query: str, k: int = 5) -> list[RetrievedChunk]:
        if not self._size or k < 1:
            return []
        return [
            RetrievedChunk(self._text(number), self._place(number), score)
            for number, score in self.ranked(query, min(k, self._size))
        ]

    @abstractmethod
    def index_texts(self, chunks: Sequence[str]) -> None:
        """Index ``chunks`` in memory."""

    @abstractmethod
    def use(self, index: Index) -> None:
        """Use what ``index`` keeps, and let it keep what is missing."""

    @abstractmethod
    def ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        """The numbers of the best ``k`` passages with their scores, best first, ties in their
        order; there are at least ``k`` passages."""


class VectorSearch(Search):
    """Compares vectors of an embedder by their cosine; the query's are weighted where the embedder
    gives weights."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._embedder: Embedder | None = None
        self.vectors = Matrix(np.zeros((0, 1), np.float32))
        self._weights: Floats | None = None

    @property
    def embedder(self) -> Embedder:
        """The embedder of the settings."""
        if self._embedder is None:
            self._embedder = embedder_called(self.settings.embedder)
        return self._embedder

    def index_texts(self, chunks: Sequence[str]) -> None:
        self.set_vectors(Matrix(self.embedder.embed(chunks)))

    def use(self, index: Index) -> None:
        self.set_vectors(index.vectors(self.embedder))

    def set_vectors(self, vectors: Matrix) -> None:
        """Search ``vectors`` [N, D]."""
        self.vectors, self._weights = vectors, self.embedder.weights(vectors)

    def query(self, text: str) -> Floats:
        """The vector [D] of a query."""
        vector = self.embedder.embed([text])
        found: Floats = unit(vector if self._weights is None else vector * self._weights)[0]
        return found


class ExactSearch(VectorSearch):
    """``retrieval:exact``: the cosine with every passage."""

    name = "exact"

    def ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        return best(self.vectors.dot(self.query(query)), k)


class FaissSearch(VectorSearch):
    """``retrieval:faiss``: the same by faiss's flat index, on all cores."""

    name = "faiss"

    def set_vectors(self, vectors: Matrix) -> None:
        import faiss

        self._weights = self.embedder.weights(vectors)
        self._faiss = faiss.IndexFlatIP(vectors.shape[1])
        for block in vectors.blocks():
            self._faiss.add(np.ascontiguousarray(block))

    def ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        scores, numbers = self._faiss.search(self.query(query)[None], k)
        order = np.lexsort((numbers[0], -scores[0]))
        return [(int(numbers[0][at]), float(scores[0][at])) for at in order]


class BM25Search(Search):
    """``retrieval:bm25``: BM25 of words in small letters (Robertson and Zaragoza 2009), by bm25s
    with k1 = 1.5, b = 0.75 and Lucene's idf, ln(1 + (N - n + 0.5) / (n + 0.5))."""

    name = "bm25"

    def index_texts(self, chunks: Sequence[str]) -> None:
        self._bm25 = _bm25_of(chunks)

    def use(self, index: Index) -> None:
        import bm25s

        def build(folder: Path) -> None:
            _bm25_of(list(index.passages.texts())).save(folder, show_progress=False)

        def read(folder: Path) -> Any:
            # In memory: it is as large as the texts at most, and was there when it was made.
            return bm25s.BM25.load(folder, mmap=False, allow_pickle=False, show_progress=False)

        self._bm25 = index.kept("bm25", build, read)

    def ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        words = [word for word in words_of(query) if word in self._bm25.vocab_dict]
        if not words:
            return [(number, 0.0) for number in range(k)]
        return best(self._bm25.get_scores(words), k)


class FusedSearch(Search):
    """``retrieval:fused``: passages by the sum of 1 / (60 + r) over the ranks r that they have in
    ``exact`` and ``bm25``, each with four times as many passages as are asked for. What has nothing
    in common with the query has no rank."""

    name = "fused"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.parts: tuple[Search, ...] = (ExactSearch(config), BM25Search(config))

    def index_texts(self, chunks: Sequence[str]) -> None:
        for part in self.parts:
            part.index_texts(chunks)

    def use(self, index: Index) -> None:
        for part in self.parts:
            part.use(index)

    def ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        fused: dict[int, float] = {}
        for part in self.parts:
            found = part.ranked(query, min(4 * k, self._size))
            for rank, (number, score) in enumerate(found, 1):
                if score > 0:
                    fused[number] = fused.get(number, 0.0) + 1 / (RANK_OFFSET + rank)
        return sorted(fused.items(), key=lambda item: (-item[1], item[0]))[:k]


def best(scores: NDArray[Any], k: int) -> list[tuple[int, float]]:
    """The numbers of the ``k`` highest of ``scores`` [N] with their scores, the highest first, ties
    in their order."""
    numbers = np.arange(len(scores))
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        numbers = np.flatnonzero(scores >= least)
    order = numbers[np.argsort(-scores[numbers], kind="stable")[:k]]
    return [(int(number), float(scores[number])) for number in order]


def _bm25_of(chunks: Sequence[str]) -> Any:
    import bm25s

    found = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    found.index([words_of(chunk) for chunk in chunks], show_progress=False)
    return found
