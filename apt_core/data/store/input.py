"""Reads a source: its documents as chunks, and what identifies them."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel

from apt_core.data.pipeline.prepare import content_digest
from apt_core.data.pipeline.split import BY_POSITION, TRAIN, VAL
from apt_core.data.store.chunks import (
    CHUNK_CHARS,
    CHUNK_DOCUMENTS,
    chunk_size,
    name_of,
    pack_chunk,
)
from apt_core.data.store.lock import StopCheck, never_stop
from apt_core.error_text import one_line, where_raised
from apt_core.errors import AptError, ConfigError, ProviderError
from apt_core.providers.base import Provider
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.documents import Document

T = TypeVar("T")

SAMPLE_CHARS = 2000


@contextmanager
def naming(kind: str, provider: Provider, what: str) -> Iterator[None]:
    """Give errors of a provider its name. Those that are written for a person stay as they are."""
    try:
        yield
    except AptError:
        raise
    except Exception as error:
        place = where_raised(error, "")
        raise ProviderError(
            f"{name_of(kind, provider)} failed in {what} ({place}): {one_line(error)}"
        ) from error


class SourceReader:
    """Reads the documents of a source: those that it holds out first, so that of two that repeat
    each other the one that is evaluated on is kept.

    With ``hashing``, ``sha256`` is that of all that was read. ``sample`` is the beginning of the
    first text. ``check_stop`` is called at each document.
    """

    def __init__(
        self,
        source: DatasetProvider,
        *,
        hashing: bool = False,
        check_stop: StopCheck = never_stop,
    ) -> None:
        self.source, self._check_stop = source, check_stop
        self.holds_out = False
        self.num_read = 0
        self.sample = ""
        self._sizes: deque[int] = deque()
        self._digest = hashlib.sha256() if hashing else None

    @property
    def sha256(self) -> str | None:
        """The hash of the documents that were read so far, or None where nobody asked."""
        return None if self._digest is None else self._digest.hexdigest()

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Each document with its side: BY_POSITION unless the source holds out its own. Raises
        ConfigError for what is no document, ProviderError where the source fails."""
        source = self.source
        held_out = self._asked(source.held_out, "held_out")
        if held_out is not None:
            self.holds_out = True
            for document in self._read(held_out, "held_out"):
                yield VAL, document
        side = TRAIN if self.holds_out else BY_POSITION
        for document in self._read(self._asked(source.documents, "documents"), "documents"):
            yield side, document

    def chunks(self) -> Iterator[bytes]:
        """The documents as chunks; raises what :meth:`documents` does."""
        waiting: list[Document] = []
        size, last = 0, BY_POSITION
        for side, document in self.documents():
            if waiting and (side != last or size >= CHUNK_CHARS or len(waiting) >= CHUNK_DOCUMENTS):
                yield self._packed(waiting, last)
                waiting, size = [], 0
            self.sample = self.sample or next(filter(None, document.parts), "")[:SAMPLE_CHARS]
            waiting.append(document)
            size, last = size + document.num_chars, side
        if waiting:
            yield self._packed(waiting, last)

    def next_size(self) -> int:
        """The bytes of text of the next chunk whose result comes, in their order."""
        return self._sizes.popleft()

    def fingerprint_of_all(self) -> str:
        """Read everything; the hash of it."""
        for _ in self.documents():
            pass
        assert self._digest is not None
        return self._digest.hexdigest()

    def _packed(self, documents: list[Document], side: int) -> bytes:
        try:
            chunk = pack_chunk(documents, side)
        except UnicodeEncodeError:
            for document in documents:
                self._require_text(document)
            raise
        self._sizes.append(chunk_size(chunk))
        return chunk

    def _require_text(self, document: Document) -> None:
        try:
            for text in document.parts:
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name_of('dataset', self.source)} yields a document with a lone surrogate "
                f"(character {error.start}), which is no text",
                where=document.where,
            ) from None

    def _asked(self, method: Callable[[], T], name: str) -> T:
        with naming("dataset", self.source, f"{name}()"):
            return method()

    def _read(self, records: Any, name: str) -> Iterator[Document]:
        with naming("dataset", self.source, f"{name}()"):
            records = iter(records)
        for number in itertools.count(1):
            with naming("dataset", self.source, f"{name}()"):
                # A generator has no end of its own to catch here.
                record: Any = next(records, _END)
            if record is _END:
                return
            self._check_stop()
            where = f"{self.source.get_name()} {name}() {number}"
            try:
                document = Document.of(record, where)
            except ValueError as error:
                raise ConfigError(
                    f"{name_of('dataset', self.source)}: document {number} of {name}() {error}",
                    key="data.loader",
                    where=getattr(record, "where", ""),
                ) from None
            self.num_read += 1
            if self._digest is not None:
                self._require_text(document)
                key = "" if document.key is None else f"k{document.key}"
                ends = bytes([document.begins, document.ends])
                self._digest.update(content_digest(document) + name.encode() + ends)
                self._digest.update(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
            yield document


_END = object()


def settings_row(config: Any) -> Any:
    """The settings of a provider as far as they are plain: what may decide what it does."""
    if isinstance(config, BaseModel):
        return config.model_dump(mode="json")
    return str(config)
