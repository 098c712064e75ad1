"""pydantic's errors in words for the person who wrote the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from apt_core.errors import did_you_mean

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "finite_number": "a finite number",
    "byte_size": "a size such as 5GB",
    "byte_size_unit": "a size such as 5GB",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_NUMERIC = {"int_type": int, "float_type": float, "int_parsing": int, "float_parsing": float}


def describe(value: Any) -> str:
    """A value in a message: short, and safe for anything that can stand in a profile."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return f"the text {value[:60]!r}{'…' if len(value) > 60 else ''}"
    return f"a {type(value).__name__}"


def in_words(error: ErrorDetails) -> tuple[str, str]:
    """What is wrong with a value (any error but an unknown key), and a hint or an empty text."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    shown = describe(value)
    if kind in _KINDS:
        hint = ""
        if isinstance(value, str) and kind in _NUMERIC and _is_number(value, _NUMERIC[kind]):
            hint = "write it without quotes"
        return f"must be {_KINDS[kind]}, not {shown}", hint
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {context[bound]}, not {shown}", ""
    if kind == "literal_error":
        expected = str(context["expected"])
        choices = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
        return f"must be {expected}, not {shown}", did_you_mean(str(value)[:60], choices)
    if kind == "missing":
        return "is missing", ""
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, not {shown}", ""
    if kind == "too_long":
        return f"holds more than the {context['max_length']:,} items that it may", ""
    if kind in ("too_short", "string_too_short"):
        least = context.get("min_length", 1)
        if least > 1:
            unit = "characters" if kind == "string_too_short" else "items"
            return f"must have at least {least:,} {unit}, not {len(value)}", ""
        return "must not be empty", ""
    if kind.startswith("apt_"):
        hint = did_you_mean(str(value)[:60], context.get("choices", ()))
        return f"{error['msg']}, not {shown}", hint
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{text[:1].lower()}{text[1:]} (it is {shown})", ""


def _is_number(text: str, kind: Callable[[str], float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
