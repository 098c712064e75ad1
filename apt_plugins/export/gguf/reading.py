"""Which kind of vocabulary a tokenizer.json has for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_plugins.export.gguf.byte_level import read_byte_level
from apt_plugins.export.gguf.sentencepiece import read_sentencepiece
from apt_plugins.export.gguf.vocabulary import Reading, Vocabulary


def read_vocabulary(
    data: Mapping[str, Any], rows: int, *, assume_nfc: bool = False
) -> tuple[Vocabulary | None, list[str]]:
    """The vocabulary that a tokenizer.json has, filled up to ``rows`` ids; or None, and what
    llama.cpp has no equal for. With ``assume_nfc`` texts need not be brought to NFC."""
    if assume_nfc and data.get("normalizer") == {"type": "NFC"}:
        data = {**data, "normalizer": None}
    reading = Reading(data)
    kind = reading.model.get("type", "BPE")
    if kind != "BPE":
        reading.refuse(f"is of type {kind}; a GGUF takes byte-pair encodings")
        return None, reading.problems
    read = read_sentencepiece if reading.model.get("byte_fallback") else read_byte_level
    found = read(reading, rows)
    return (None if reading.problems else found), reading.problems
