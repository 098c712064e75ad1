"""Formats the numbers and texts of a run for the page."""

from __future__ import annotations

import re
from math import isfinite

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


TIME = re.compile(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)Z$")
"""A moment as a manifest has it."""


def number(value: float) -> str:
    """A number in at most five significant digits, with commas between thousands.

    >>> [number(v) for v in (2.468129, 51200, 0.0001, 1.5e9, float("nan"))]
    ['2.4681', '51,200', '1e-4', '1.5e9', 'nan']
    """
    if not isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e9:
        digits = f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.5g}"
        return f"{value:,.1f}" if "e" in digits else digits
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def size(count: float) -> str:
    """``1_234_567 -> '1.23M'``; small counts in full."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:,.0f}"


def plain(value: object, *, depth: int = 3) -> str:
    """A value of the manifest in words.

    >>> [plain(v) for v in (12345, {"train": 70, "val": 7}, [1, 2], True, "2026-11-30T08:04:52Z")]
    ['12,345', 'train 70, val 7', '1, 2', 'yes', '2026-11-30 08:04:52 UTC']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value)
    if isinstance(value, dict) and depth:
        return ", ".join(f"{key} {plain(each, depth=depth - 1)}" for key, each in value.items())
    if isinstance(value, list) and depth:
        return ", ".join(plain(each, depth=depth - 1) for each in value)
    return TIME.sub(r"\1 \2 UTC", str(value))


def cut(text: str, limit: int) -> str:
    """``text``, or its first ``limit`` characters and the number of characters left out."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more)"


def visible(text: str) -> str:
    """``text`` with control characters replaced by their pictures.

    A byte model may write any of them. Characters that reorder the text around them, or cannot be
    encoded, become U+FFFD.
    """
    return HIDDEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
