"""Vocabularies of byte-pair encoding of characters that falls back to bytes, as SentencePiece makes
them: Llama 2, Mistral, and our own characters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from apt_plugins.export.gguf.vocabulary import (
    BYTE,
    NORMAL,
    UNKNOWN,
    Reading,
    Vocabulary,
    typed,
)

SPACE = "\u2581"
"""Stands for a space in tokens."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_sentencepiece(reading: Reading, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json with byte_fallback, with ``rows`` ids."""
    model = reading.model
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges"):
        if model.get(name):
            reading.refuse(f"has {name}, which llama.cpp does not know")
    spaces = _Spaces(reading)
    tokens, types = reading.placed(rows)
    unknown = model.get("unk_token")
    for token, text in enumerate(tokens):
        if text == unknown:
            types[token] = UNKNOWN
        elif text == "\0":  # at which llama.cpp takes the text of a token to end
            tokens[token], types[token] = "<0x00>", BYTE
        elif types[token] == NORMAL and _BYTE.fullmatch(text):
            types[token] = BYTE
    if not spaces.replaced:
        if any(SPACE in text for text in tokens):
            reading.refuse(f"tells spaces from {SPACE}, which are one for llama.cpp")
        tokens = [
            text.replace(" ", SPACE) if kind == NORMAL else text
            for text, kind in zip(tokens, types, strict=True)
        ]
    if spaces.split and any(SPACE in text[1:] for text in tokens):
        reading.refuse("splits texts at spaces, which some of its tokens have inside")
    merges = reading.merges
    _check_bytes(reading, tokens, types)
    _check_merges(reading, merges, [t for t, k in zip(tokens, types, strict=True) if k == NORMAL])
    rank = {left + right: number for number, (left, right) in reversed([*enumerate(merges)])}
    scores = [-float(rank.get(text, len(rank))) for text in tokens]
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=spaces.prefixed)


class _Spaces:
    """What becomes of spaces: whether they are ``replaced`` by SPACE, whether a text is
    ``prefixed`` by one, and whether it is ``split`` before each."""

    def __init__(self, reading: Reading) -> None:
        self.replaced = self.prefixed = self.split = False
        for part in ("normalizer", "pre_tokenizer"):
            self._read(reading, reading.data.get(part))

    def _read(self, reading: Reading, part: Mapping[str, Any] | None) -> None:
        if part is None:
            return
        kind = part.get("type")
        if kind == "Sequence":
            for step in part.get("normalizers") or part.get("pretokenizers") or ():
                self._read(reading, step)
        elif kind == "Prepend" and part.get("prepend") == SPACE:
            self.prefixed = True
        elif kind == "Replace" and part.get("pattern") == {"String": " "}:
            self.replaced = part.get("content") == SPACE
        elif kind == "Metaspace" and part.get("replacement") == SPACE:
            self.replaced, self.split = True, part.get("split", True)
            if part.get("prepend_scheme", "always") != "never":
                reading.refuse(
                    "puts a space before texts that begin with none (Metaspace), and llama.cpp "
                    "before all or none"
                )
        else:
            reading.refuse(f"prepares texts by {typed(part)}, which llama.cpp does not")


def _check_bytes(reading: Reading, tokens: Sequence[str], types: Sequence[int]) -> None:
    """llama.cpp writes what is no token as bytes, and ends itself where one is missing."""
    there = set(tokens)
    missing = [
        byte
        for byte in range(256)
        if f"<0x{byte:02X}>" not in there and (byte > 127 or chr(byte) not in there | {" "})
    ]
    if missing:
        reading.refuse(f"has no token for {len(missing)} bytes, such as 0x{missing[0]:02X}")


def _check_merges(
    reading: Reading, merges: Sequence[tuple[str, str]], tokens: Sequence[str]
) -> None:
    """llama.cpp has no merges: it makes any two tokens one where that is a token, those first whose
    token is the best."""
    there = set(tokens)
    pairs = {
        (text[:at], text[at:])
        for text in tokens
        for at in range(1, len(text))
        if text[:at] in there and text[at:] in there
    }
    made = [left + right for left, right in merges]
    changes = sum(one != other for one, other in pairwise(made))
    if set(merges) != pairs or changes != max(0, len(set(made)) - 1):
        reading.refuse("merges in another order than by its tokens, as llama.cpp does")
