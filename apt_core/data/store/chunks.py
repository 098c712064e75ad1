"""Chunks of documents, the tasks of a build: how they are made, sent, encoded and read back.

A chunk in and its result out are bytes, so that any engine can bring them to where they are worked
on. What becomes of a document depends on itself alone, never on its chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.data.pipeline.minhash import BINS, signature
from apt_core.data.pipeline.prepare import (
    KEPT,
    PipelineSettings,
    content_digest,
    learned_bytes,
    prepare,
    split_position,
)
from apt_core.data.pipeline.split import SplitRule
from apt_core.data.store.frames import pack, unpack
from apt_core.error_text import one_line, where_raised
from apt_core.errors import ConfigError, ProviderError
from apt_core.providers.base import Provider
from apt_core.providers.documents import FORMS, Document, Message
from apt_core.providers.tokenizer import Encoded, TokenizerProvider, token_dtype

CHUNK_CHARS = 1 << 20
"""Characters from which on a chunk is full."""

CHUNK_DOCUMENTS = 4096
"""The most documents of a chunk."""

DOCUMENT = np.dtype(
    [
        ("digest", "V32"),
        ("position", "<u8"),
        ("status", "u1"),
        ("pieces", "u1"),
        ("form", "u1"),
        ("chars", "<u8"),
    ]
)
PIECE = np.dtype(
    [("digest", "V32"), ("side", "u1"), ("marked", "?"), ("tokens", "<u8"), ("bytes", "<u8")]
)


def pack_chunk(documents: Iterable[Document], side: int) -> bytes:
    """A chunk whose documents are of one ``side``."""
    rows: list[Any] = []
    texts: list[bytes] = []
    for document in documents:
        encoded = [text.encode("utf-8") for text in document.parts]
        texts += encoded
        sizes = [len(each) for each in encoded]
        roles = [message.role for message in document.messages]
        ends = [document.begins, document.ends]
        rows.append([sizes, document.text is not None, roles, document.where, document.key, *ends])
    return pack({"side": side, "documents": rows}, [b"".join(texts)])


def unpack_chunk(chunk: bytes) -> tuple[int, list[Document]]:
    """The side and the documents of a chunk."""
    header, (block,) = unpack(chunk)
    found, start = [], 0
    for sizes, is_text, roles, where, key, begins, ends in header["documents"]:
        parts = []
        for size in sizes:
            parts.append(str(block[start : start + size], "utf-8"))
            start += size
        if is_text:
            found.append(Document(parts[0], where=where, key=key, begins=begins, ends=ends))
        elif roles:
            turns = tuple(map(Message, roles, parts))
            found.append(Document(messages=turns, where=where, key=key))
        else:
            found.append(Document(prompt=parts[0], response=parts[1], where=where, key=key))
    return header["side"], found


def chunk_size(chunk: bytes) -> int:
    """The bytes of the text of a chunk."""
    return len(unpack(chunk)[1][0])


@dataclass(frozen=True)
class Piece:
    """What is kept of a document, or of one side of it. ``side`` is one of BY_POSITION, TRAIN and
    VAL; ``learned`` is None where all ids are."""

    side: int
    digest: bytes
    num_bytes: int
    ids: npt.NDArray[Any]
    learned: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Prepared:
    """A document after all that is done without comparing it with others. ``status`` says whether
    it is kept, ``form`` is its place in FORMS; ``signature`` is None unless near-duplicates are
    looked for."""

    status: int
    digest: bytes
    position: int
    form: int
    num_chars: int
    signature: npt.NDArray[np.uint32] | None
    pieces: tuple[Piece, ...]


class ChunkEncoder:
    """Does the work on chunks: the same in the process that builds and in any other."""

    def __init__(
        self, tokenizer: TokenizerProvider, settings: PipelineSettings, rule: SplitRule
    ) -> None:
        self.tokenizer, self.settings, self.rule = tokenizer, settings, rule
        self._vocab_size = tokenizer.vocab_size
        self.dtype = token_dtype(self._vocab_size).newbyteorder("<")

    def __call__(self, chunk: bytes) -> bytes:
        """The result of a chunk, for :func:`results_of`. Raises ConfigError for a document that the
        tokenizer refuses, ProviderError where it fails."""
        side, documents = unpack_chunk(chunk)
        rows = np.zeros(len(documents), DOCUMENT)
        kept: list[tuple[int, Document, bytes]] = []
        signatures: list[npt.NDArray[np.uint32]] = []
        for row, document in zip(rows, documents, strict=True):
            status, document = prepare(document, self.settings)
            row["status"], row["form"] = status, FORMS.index(document.form)
            row["chars"] = document.num_chars
            if status != KEPT:
                continue
            digest = content_digest(document)
            row["digest"], row["position"] = digest, split_position(document, digest)
            if self.settings.deduplicate == "near":
                signatures.append(signature("\n".join(document.parts)))
            before = len(kept)
            for piece_side, part in [(side, document)] if side else self.rule.pieces(document):
                own = digest if part is document else content_digest(part)
                kept.append((piece_side, part, own))
            row["pieces"] = len(kept) - before
        encoded = self._encode([document for _, document, _ in kept])
        pieces = np.zeros(len(kept), PIECE)
        for piece, (piece_side, document, own), each in zip(pieces, kept, encoded, strict=True):
            piece["digest"], piece["side"], piece["tokens"] = own, piece_side, len(each.ids)
            piece["marked"] = each.learned is not None
            piece["bytes"] = learned_bytes(document, each.learned is None)
        ids = [each.ids for each in encoded]
        marks = [each.learned for each in encoded if each.learned is not None]
        blocks = [
            rows,
            pieces,
            np.array(signatures, "<u4"),
            np.concatenate(ids or [np.empty(0)]).astype(self.dtype, copy=False),
            np.concatenate(marks or [np.empty(0, np.bool_)]),
        ]
        return pack({}, [block.tobytes() for block in blocks])

    def _encode(self, documents: list[Document]) -> list[Encoded]:
        try:
            found = self.tokenizer.encode_documents(documents)
            if len(found) != len(documents):
                raise TypeError(f"makes {len(found)} of {len(documents)} documents")
        except Exception as error:
            for document in documents:
                self._blame(document)
            raise self._failed(error, "") from error
        return [self._checked(*each) for each in zip(found, documents, strict=True)]

    def _blame(self, document: Document) -> None:
        """Raise the error of a document, if it is the one that fails."""
        try:
            self.tokenizer.encode_document(document)
        except Exception as error:
            raise self._failed(error, document.where) from error

    def _failed(self, error: Exception, where: str) -> ConfigError | ProviderError:
        name = name_of("tokenizer", self.tokenizer)
        if isinstance(error, ConfigError | ProviderError):
            return error
        if isinstance(error, ValueError):
            message = f"{name} cannot encode a document: {error}"
            return ConfigError(message, key="data.tokenizer_name", where=where)
        place = where_raised(error, "")
        at = f" on {where}" if where else ""
        return ProviderError(f"{name} failed{at} ({place}): {one_line(error)}")

    def _checked(self, encoded: Any, document: Document) -> Encoded:
        if not isinstance(encoded, Encoded):
            encoded = Encoded(encoded)
        ids, learned, wrong = encoded.ids, encoded.learned, ""
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "ui":
            wrong = f"a {type(ids).__name__} that is no 1-D array of whole numbers"
        elif ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            wrong = f"ids from {ids.min()} to {ids.max()}, of a vocabulary of {self._vocab_size}"
        elif learned is not None and not _are_marks(learned, ids):
            wrong = f"marks that are no array of booleans, one an id ({len(ids)})"
        if wrong:
            name = name_of("tokenizer", self.tokenizer)
            raise ConfigError(
                f"{name} makes {wrong}", key="data.tokenizer_name", where=document.where
            )
        return Encoded(ids.astype(self.dtype, copy=False), learned)


def results_of(result: bytes, dtype: npt.DTypeLike) -> Iterator[Prepared]:
    """The documents of a chunk, in order, from the result of :class:`ChunkEncoder`."""
    blocks = unpack(result)[1]
    rows, pieces = np.frombuffer(blocks[0], DOCUMENT), np.frombuffer(blocks[1], PIECE)
    signatures = np.frombuffer(blocks[2], "<u4").reshape(-1, BINS)
    ids, marks = np.frombuffer(blocks[3], dtype), np.frombuffer(blocks[4], np.bool_)
    at_id = at_mark = at_piece = at_signature = 0
    # Python's own numbers: those of numpy are slow one by one.
    of_pieces = pieces.tolist()
    for digest, position, status, count, form, chars in rows.tolist():
        found = []
        for piece_digest, side, marked, tokens, num_bytes in of_pieces[at_piece : at_piece + count]:
            learned = None
            if marked:
                learned, at_mark = marks[at_mark : at_mark + tokens], at_mark + tokens
            piece_ids, at_id = ids[at_id : at_id + tokens], at_id + tokens
            found.append(Piece(side, piece_digest, num_bytes, piece_ids, learned))
        at_piece += count
        values = None
        if status == KEPT and len(signatures):
            values, at_signature = signatures[at_signature], at_signature + 1
        yield Prepared(status, digest, position, form, chars, values, tuple(found))


def _are_marks(learned: Any, ids: npt.NDArray[Any]) -> bool:
    is_array = isinstance(learned, np.ndarray) and learned.dtype == np.bool_
    return is_array and learned.shape == ids.shape


def name_of(kind: str, provider: Provider) -> str:
    """A provider in a message: its kind and name, and the class."""
    cls = type(provider)
    try:
        name = str(provider.get_name())
    except Exception:
        name = cls.__name__
    return f"{kind}:{name} ({cls.__module__}.{cls.__qualname__})"
