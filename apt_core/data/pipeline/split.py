"""Decides which documents are held out for validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from apt_core.providers.documents import Document

BY_POSITION, TRAIN, VAL = range(3)
"""The side of a piece: of the split position of its document, or one of the two in any case."""

FEW_DOCUMENTS = 20
"""In a corpus of fewer documents each text is split, instead of texts being held out whole."""

WHOLE = 1 << 64


@dataclass(frozen=True)
class SplitRule:
    """Documents whose split position is less than ``below`` are held out. With ``inside``, the last
    ``fraction`` of each text is, and only prompts and conversations go by position. ``most`` bounds
    the characters that are held out: of more, those of the least positions are."""

    below: int
    fraction: float = 0.0
    inside: bool = False
    most: int | None = None

    @classmethod
    def of_fraction(cls, fraction: float, most: int | None = None) -> SplitRule:
        """Hold out about ``fraction`` of the documents, chosen by their position."""
        return cls(round(fraction * WHOLE), fraction, most=most)

    def corrected(self, seen: SplitTally) -> SplitRule | None:
        """The rule by which a corpus is to be split after all, or None where this one serves.

        A split that leaves one side empty gives it the document at that end, whatever its length;
        few documents are split inside their texts.
        """
        inside = self.inside or (seen.num_documents < FEW_DOCUMENTS and seen.num_texts > 0)
        positions = seen.others if inside else [*seen.texts, *seen.others]
        below, most = self.below, self.most
        if seen.all_too_long and inside == self.inside:
            below, most = 0, None
        if positions:
            below = min(max(below, min(positions) + 1), max(positions))
        found = replace(self, below=below, inside=inside, most=most)
        return None if found == self else found

    def pieces(self, document: Document) -> Iterator[tuple[int, Document]]:
        """The parts that are kept of a document, each with its side."""
        if not self.inside or document.text is None:
            yield BY_POSITION, document
            return
        fraction = self.fraction
        if self.most is not None and document.text:
            fraction = min(fraction, max(1, self.most // FEW_DOCUMENTS) / len(document.text))
        train, val = hold_out(document.text, fraction)
        if train:
            yield TRAIN, replace(document, text=train, ends=document.ends and not val)
        if val:
            yield VAL, replace(document, text=val, begins=document.begins and not train)


@dataclass
class SplitTally:
    """What was kept of a corpus: how many texts and other documents, and the least and the greatest
    of the split positions of each. ``all_too_long`` says that of what was to be held out nothing
    has as few characters as it may."""

    num_texts: int = 0
    num_documents: int = 0
    texts: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    all_too_long: bool = False

    def add(self, position: int, is_text: bool) -> None:
        """Count a document that is kept."""
        self.num_documents += 1
        self.num_texts += is_text
        ends = self.texts if is_text else self.others
        ends[:] = min(ends[0], position) if ends else position, max([position, *ends])


def hold_out(text: str, fraction: float = 0.1) -> tuple[str, str]:
    """Cut ``text`` into (train, held out); the held-out part is the last ``fraction`` of it.

    The cut is put after the last blank line before that point, if there is one within half of the
    held-out size, else after the last line end there, else at that character, so that the held-out
    part is never smaller than ``fraction``. The two parts together are ``text``.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")
    cut = len(text) - max(1, round(len(text) * fraction)) if text else 0
    earliest = max(0, cut - (len(text) - cut) // 2)
    for boundary in ("\n\n", "\n"):
        found = text.rfind(boundary, earliest, cut)
        if found > 0:
            cut = found + len(boundary)
            break
    return text[:cut], text[cut:]
