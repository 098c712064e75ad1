"""Normalises and filters one document, and hashes what it says."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from apt_core.providers.dataset import DataSection
from apt_core.providers.documents import LEARNED_ROLE, Document

KEPT, EMPTY, TOO_SHORT, TOO_LONG = range(4)
"""What became of a document before it was compared with others."""

STEPS = {EMPTY: "empty", TOO_SHORT: "too_short", TOO_LONG: "too_long"}
"""The name under which each of them is counted."""


@dataclass(frozen=True)
class PipelineSettings:
    """The settings that decide which documents are kept, and on which side of the split."""

    normalize: Literal["none", "NFC", "NFKC"] = "none"
    min_chars: int = 1
    max_chars: int | None = None
    deduplicate: Literal["none", "exact", "near"] = "none"
    near_threshold: float = 0.8
    val_fraction: float = 0.1
    max_val_chars: int | None = 2_000_000

    @classmethod
    def of(cls, section: DataSection) -> PipelineSettings:
        """Those of the profile's ``data``."""
        return cls(
            normalize=section.normalize,
            min_chars=section.min_chars,
            max_chars=section.max_chars,
            deduplicate=section.deduplicate,
            near_threshold=section.near_threshold,
            val_fraction=section.val_fraction,
            max_val_chars=section.max_val_chars,
        )

    def row(self) -> dict[str, Any]:
        """The settings as JSON."""
        return asdict(self)

    def facts(self) -> dict[str, Any]:
        """All that decides what the pipeline does to a document, as JSON: the settings that are in
        use, and the version of Unicode where texts are normalised."""
        row = self.row()
        if self.deduplicate != "near":
            del row["near_threshold"]
        if self.normalize != "none":
            row["unicode"] = unicodedata.unidata_version
        return row


def prepare(document: Document, settings: PipelineSettings) -> tuple[int, Document]:
    """What becomes of a document, and the document with its texts in the normal form.

    A document without a character other than white space is empty.
    """
    if settings.normalize != "none":
        texts = [unicodedata.normalize(settings.normalize, text) for text in document.parts]
        document = document.with_texts(texts)
    length = document.num_chars
    if not any(map(_says_something, document.parts)):
        return EMPTY, document
    if length < settings.min_chars:
        return TOO_SHORT, document
    if settings.max_chars is not None and length > settings.max_chars:
        return TOO_LONG, document
    return KEPT, document


def _says_something(text: str) -> bool:
    # Most texts do so in their beginning: strip() would copy all of a long one.
    return not text[:64].isspace() if 0 < len(text) <= 64 else bool(text) and bool(text.strip())


def content_digest(document: Document) -> bytes:
    """A sha256 that two documents share only if they are of one form and say the same."""
    form = b"text" if document.text is not None else b"turns" if document.messages else b"pair"
    return hashlib.sha256(form + b"\0" + document.content.encode("utf-8")).digest()


def split_position(document: Document, digest: bytes) -> int:
    """A place in 0 to 2**64 - 1 that decides the side of the split: of the document's key, else
    of its ``digest``."""
    if document.key is not None:
        digest = hashlib.sha256(b"key\0" + document.key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def learned_bytes(document: Document, all_is_learned: bool) -> int:
    """The bytes (UTF-8) of the texts of a document that are learned: of a pair the response, of a
    conversation the assistant's turns, unless its tokenizer says that all is."""
    if document.text is not None or all_is_learned:
        texts = list(document.parts)
    elif document.response is not None:
        texts = [document.response]
    else:
        texts = [each.content for each in document.messages if each.role == LEARNED_ROLE]
    return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
