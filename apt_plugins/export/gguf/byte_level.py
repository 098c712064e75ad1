"""Vocabularies of byte-level byte-pair encoding, as of GPT-2, Llama 3 and Qwen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apt_plugins.export.gguf.vocabulary import Reading, Vocabulary, typed

NEVER_MERGED = "\u00ff \u00ff"
"""The merge of a vocabulary without merges, which llama.cpp does not load: of twice the byte 0xFF,
which no UTF-8 has."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = f"(?i:{_CONTRACTIONS})"
_OTHER_FORMS = (
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])",
)
"""Other ways to write _ANY_CASE."""

_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS = rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_OTHERS}|{_SPACES}"
_QWEN35 = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
}
"""The names by which llama.cpp knows the patterns that split a text into words, one after the
other, by these and whether a word that is a token is taken whole, whatever the merges make of it.

These split every text alike, but for letters and digits that are newer than llama.cpp's Unicode,
and ``'ſ``, which is no contraction there. Others that it names, such as ``gpt-4o`` and ``tekken``,
split words with combining marks in another way than the tokenizers that they are named after.
"""


def read_byte_level(reading: Reading, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json that encodes bytes, with ``rows`` ids."""
    model = reading.model
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            reading.refuse(f"has {name} {model[name]!r}, which llama.cpp does not know")
    if (normalizer := reading.data.get("normalizer")) is not None:
        remedy = ": --option assume_nfc=true" if normalizer == {"type": "NFC"} else ""
        reading.refuse(f"normalises texts ({typed(normalizer)}), which llama.cpp does not{remedy}")
    patterns = _patterns(reading, reading.data.get("pre_tokenizer"))
    if "ByteLevel" not in str(reading.data.get("pre_tokenizer")):
        reading.refuse("does not write texts as bytes (ByteLevel)")
    merges = [f"{left} {right}" for left, right in reading.merges]
    pre = "qwen2"  # any will do where nothing is merged
    if merges and not reading.problems:
        key = (tuple(map(_canonical, patterns)), bool(model.get("ignore_merges")))
        pre = PRE_TOKENIZERS.get(key, "")
        if not pre:
            listed = ", then ".join(map(repr, patterns)) or "no pattern"
            reading.refuse(f"splits texts by {listed}, for which llama.cpp has no name")
    tokens, types = reading.placed(rows)
    return Vocabulary("gpt2", tokens, types, merges or [NEVER_MERGED], pre)


def _patterns(reading: Reading, part: Mapping[str, Any] | None) -> list[str]:
    """The patterns by which a pre_tokenizer splits, one after the other."""
    part = part or {}
    kind = part.get("type")
    if kind == "Sequence":
        steps = part.get("pretokenizers") or ()
        return [pattern for step in steps for pattern in _patterns(reading, step)]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            reading.refuse("puts a space before a text (add_prefix_space)")
        return [_GPT2] if part.get("use_regex", True) else []
    if kind == "Digits" and part.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part.get("pattern") or {}
        return [pattern.get("Regex") or re.escape(pattern.get("String", ""))]
    reading.refuse(f"splits texts by {typed(part or None)}, as llama.cpp does not")
    return []


def _canonical(pattern: str) -> str:
    for form in _OTHER_FORMS:
        pattern = pattern.replace(form, _ANY_CASE)
    return pattern
