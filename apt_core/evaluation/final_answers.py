"""The final answer that a text comes to."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_MARK = re.compile(r"####|\banswer\s+is\b\s*:?|\banswer\s*:", re.IGNORECASE)
_BOX = r"\boxed{"
_NUMBER = re.compile(r"(?<![\w)])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


def final_answer(text: str) -> str:
    r"""The result that ``text`` states, in one form: equal ones are equal strings.

    It stands in the last ``\boxed{…}``; else behind the last ``####``, "answer is" or "answer:", on
    that line: the first number there, or all of it. Where nothing marks it, it is the last number,
    or without any the last line. Of numbers neither thousands separators nor zeros at the end of
    decimals count, of words neither case nor spaces nor the punctuation around them.

    >>> final_answer("12 + 30 = 42 pears. The answer is 42.0.")
    '42'
    >>> final_answer("So Ana has 1,042"), final_answer(r"thus \boxed{x + 1}"), final_answer("Yes!")
    ('1042', 'x + 1', 'yes')
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    boxed = _boxed(text)
    if boxed is not None:
        number = _NUMBER.fullmatch(boxed.strip().strip("$"))
        return _plain(boxed) if number is None else _canonical(number.group())
    marks = list(_MARK.finditer(text))
    if marks:
        line = (text[marks[-1].end() :].strip().splitlines() or [""])[0]
        numbers = _NUMBER.findall(line)[:1]
        return _canonical(numbers[0]) if numbers else _plain(line)
    numbers = _NUMBER.findall(text)
    lines = text.strip().splitlines() or [""]
    return _canonical(numbers[-1]) if numbers else _plain(lines[-1])


def _boxed(text: str) -> str | None:
    """What is between the braces of the last box; None without one that is closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for place in range(start + len(_BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + len(_BOX) : place]
    return None


def _canonical(number: str) -> str:
    whole = number.replace(",", "")
    if "/" in whole:
        return whole
    try:
        value = format(Decimal(whole), "f")
    except InvalidOperation:  # more digits than it counts
        return whole
    if "." in value:
        value = value.rstrip("0").rstrip(".")
    return "0" if value == "-0" else value


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?$\"'")
