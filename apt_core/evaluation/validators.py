"""Judges what a model writes: each validator gives one number between 0 and 1."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from apt_core.json_files import parse_json

_NO_PUNCTUATION: Mapping[int, None] = {ord(each): None for each in string.punctuation}

NORMALIZERS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "case": str.casefold,
    "spaces": lambda text: " ".join(text.split()),
    "punctuation": lambda text: text.translate(_NO_PUNCTUATION),
    "unicode": lambda text: unicodedata.normalize("NFKC", text),
    "last_line": lambda text: (text.strip().splitlines() or [""])[-1],
}
"""What may be done to a text before it is compared, in the order in which it is named."""

BRACKETS = {")": "(", "]": "[", "}": "{"}

_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|\w+|[^\w\s]")

JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def normalized(text: str, names: Iterable[str]) -> str:
    """``text`` after these of NORMALIZERS.

    >>> normalized(" The  END. ", ("case", "punctuation", "spaces"))
    'the end'
    """
    for name in names:
        text = NORMALIZERS[name](text)
    return text


def exact_match(text: str, answer: str, names: Sequence[str] = ("strip",)) -> float:
    """Whether both are the same once they are :func:`normalized`."""
    return float(normalized(text, names) == normalized(answer, names))


def number_match(text: str, answer: str) -> float:
    """Whether the last number of ``text`` is that of ``answer``.

    >>> number_match("12 and 30 make 42.", "42"), number_match("about forty", "42")
    (1.0, 0.0)
    """
    found, expected = _NUMBER.findall(text), _NUMBER.findall(answer)
    if not found or not expected:
        return 0.0
    return float(float(found[-1].replace(",", "")) == float(expected[-1].replace(",", "")))


def has_number(text: str) -> bool:
    """Whether :func:`number_match` finds a number in ``text``."""
    return _NUMBER.search(text) is not None


def is_json(text: str, keys: Mapping[str, str] | None = None) -> float:
    """Whether ``text`` is one JSON value; with ``keys``, an object that has each of them, with a
    value of the named one of JSON_TYPES."""
    try:
        value = parse_json(text)
    except ValueError:
        return 0.0
    if keys is None:
        return 1.0
    return float(
        isinstance(value, dict)
        and all(name in value and _is_a(value[name], kind) for name, kind in keys.items())
    )


def _is_a(value: Any, kind: str) -> bool:
    if kind == "any":
        return True
    return isinstance(value, JSON_TYPES[kind]) and (kind == "boolean") == isinstance(value, bool)


def is_balanced(text: str) -> float:
    """Whether each bracket of ``text`` is closed by its own kind, and none is closed unopened.

    >>> is_balanced("([]{})"), is_balanced("([)]"), is_balanced("(")
    (1.0, 0.0, 0.0)
    """
    opened = []
    for each in text:
        if each in BRACKETS.values():
            opened.append(each)
        elif each in BRACKETS and (not opened or opened.pop() != BRACKETS[each]):
            return 0.0
    return float(not opened)


LEVEL_FORMS: Mapping[int, re.Pattern[str]] = {
    3: re.compile(r"\w+\([^()]+\)(?:\s*\+\s*\w+\([^()]+\))*"),
    4: re.compile(r"[A-Za-züÜāáǎàēéěèīíǐìōóǒòūúǔùǖǘǚǜńňǹ' ,.!?-]+"),
    5: re.compile(r"[\x20-\x7e’“”–—]*[A-Za-z][\x20-\x7e’“”–—]*"),
    6: re.compile(r"[^A-Za-z\u3040-\u30ff\uac00-\ud7af]*[\u4e00-\u9fff]+[^A-Za-z\u3040-\u30ff]*"),
    7: re.compile(r"[^A-Za-z\uac00-\ud7af]*[\u3040-\u30ff]+[^A-Za-z\uac00-\ud7af]*"),
    8: re.compile(r"[^A-Za-z\u3040-\u30ff]*[\uac00-\ud7af]+[^A-Za-z\u3040-\u30ff]*"),
}
"""The form of levels of HLBD that have one: a formula, pinyin, English, Chinese, Japanese and
Korean."""


def has_level_form(text: str, level: int) -> float:
    """Whether ``text`` has the form of this level of HLBD; a level without one has that of any text
    that is not empty.

    >>> has_level_form("This mountain is very high.", 5), has_level_form("这座山很高。", 8)
    (1.0, 0.0)
    """
    text = text.strip()
    form = LEVEL_FORMS.get(level)
    return float(bool(text) if form is None else form.fullmatch(text) is not None)


def words_of(text: str) -> list[str]:
    """The words and marks of ``text``; a Chinese, Japanese or Korean character is one."""
    return _WORD.findall(text)


def distinct(text: str, n: int) -> float:
    """The share of the n-grams of words that are different (Li et al., 2016, arXiv 1510.03055); 1
    for a text that has none.

    >>> distinct("a b a b", 2)
    0.6666666666666666
    """
    words = words_of(text)
    grams = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else 1.0


def repetition(text: str, n: int = 4) -> float:
    """The share of the n-grams of words that were there before in ``text`` (Welleck et al., 2019,
    arXiv 1908.04319)."""
    return 1.0 - distinct(text, n)
