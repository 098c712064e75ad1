"""JSON that somebody else may have written: of bounded size and depth, and never more than text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from apt_core.files import read_file, read_lines

MAX_BYTES = 256 * 2**20
"""The most bytes of a file that is read as a whole. The largest is a checkpoint's state, with that
of plugins but without tensors."""

MAX_LINE = 2**24
MAX_DEPTH = 200
MAX_DIGITS = 1000


class LongNumberError(ValueError):
    """A number that takes long to read, and that nothing which is read here has."""


def whole_number(digits: str) -> int:
    """``parse_int`` of a decoder, which without it tells how to lift Python's own limit. Raises
    LongNumberError."""
    if len(digits) > MAX_DIGITS:
        raise LongNumberError(f"holds a number of more than {MAX_DIGITS:,} digits")
    return int(digits)


def read_json(path: Path) -> Any:
    """The value in a file. Raises OSError, and ValueError for what is no JSON or too deep."""
    return parse_json(read_file(path, MAX_BYTES).decode("utf-8"))


def parse_json(text: str) -> Any:
    """The value of a text. Raises ValueError as :func:`read_json` does."""
    try:
        value = json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except LongNumberError as error:
        raise ValueError(f"it {error}") from None
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value


def _children(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, dict | list)]


def json_rows(path: Path, longest: int = MAX_LINE) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file of rows, with the mapping that it is; None for one that was cut, has more
    than ``longest`` bytes, or is something else. Empty lines are left out. Raises OSError."""
    for line in read_lines(path, longest):
        if line.strip():
            yield line, row_of(line)


def row_of(line: bytes) -> dict[str, Any] | None:
    """The mapping in a line of a file of rows; None for anything else."""
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def without_nan(value: Any) -> Any:
    """``value`` with each number that is not finite as a string: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
