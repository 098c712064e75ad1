"""Finds where the documents of a store were read: a store keeps no names of files, which may change
while what it holds stays the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy.typing as npt

from apt_core.data.pipeline.prepare import PipelineSettings, prepare
from apt_core.data.pipeline.split import FEW_DOCUMENTS, TRAIN, VAL, SplitRule
from apt_core.data.store.input import SourceReader
from apt_core.data.store.parts import TokenPart
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import TokenizerProvider

BATCH = 64
"""The documents that are encoded at a time."""


def find_origins(
    numbers: Iterable[int],
    part: TokenPart,
    source: DatasetProvider,
    tokenizer: TokenizerProvider,
    settings: PipelineSettings,
    *,
    held_out: bool,
    max_chars: int,
) -> dict[int, str]:
    """Where the documents of these numbers in ``part`` are from, by number; ``held_out`` says that
    it is the part to validate on.

    The source is read from its beginning and encoded, until all are found or ``max_chars``
    characters were read: what is found in none of them is left out. Of documents that repeat each
    other, the first counts.
    """
    wanted: dict[bytes, list[int]] = {}
    for number in {*numbers}:
        begin, end = part.spans(number, number + 1).tolist()
        wanted.setdefault(_digest(part.read(int(begin), int(end))), []).append(number)
    other = TRAIN if held_out else VAL
    candidates = _candidates(SourceReader(source), settings, other, max_chars)
    found: dict[int, str] = {}
    while wanted and (batch := [*islice(candidates, BATCH)]):
        for document, encoded in zip(batch, tokenizer.encode_documents(batch), strict=True):
            for number in wanted.pop(_digest(encoded.ids), ()):
                found[number] = document.where
    return found


def _candidates(
    reader: SourceReader, settings: PipelineSettings, other: int, max_chars: int
) -> Iterator[Document]:
    """The documents as the pipeline makes them, but for those of the ``other`` side; and the halves
    into which it cuts few ones."""
    rule = SplitRule(0, settings.val_fraction, inside=True, most=settings.max_val_chars)
    for side, document in reader.documents():
        max_chars -= document.num_chars
        if max_chars < 0:
            return
        if side == other:
            continue
        _, document = prepare(document, settings)
        yield document
        if reader.num_read <= FEW_DOCUMENTS and document.text is not None:
            yield from (piece for _, piece in rule.pieces(document))


def _digest(ids: npt.NDArray[Any]) -> bytes:
    return hashlib.sha256(ids.astype("<u4").tobytes()).digest()
