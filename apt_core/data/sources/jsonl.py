"""``dataset:jsonl``: one JSON object a line, or a JSON list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.reading import MAX_RECORD, Reading
from apt_core.data.sources.records import HINT, document_of, missing_key
from apt_core.json_files import whole_number
from apt_core.providers.documents import Document

JSON_LINES = (".jsonl", ".ndjson")

JSON = ".json"
"""Not read in a folder, where such files are rarely documents."""

MAX_NAMES = 1000
"""So many names of fields are kept to suggest one."""


class JsonLines(FileSource):
    """Reads files of JSON lines, whatever their suffix, and lists of objects in ``.json``. An
    object has ``text``, ``prompt`` and ``response``, or ``messages`` with roles, by the names that
    ``data.columns`` gives."""

    name = "jsonl"
    suffixes = JSON_LINES

    def reader(self, suffix: str) -> Reader:
        return read_json if suffix == JSON else read_jsonl


def read_jsonl(reading: Reading) -> Iterator[Document]:
    """The document of each line; empty lines are left out. Some records may have no key, but not
    all."""
    return _documents(reading, _lines(reading), "")


def read_json(reading: Reading) -> Iterator[Document]:
    """The document of each object of a list, or of objects one after the other, as of lines. A
    little more than one object is in memory at a time."""
    return _documents(reading, enumerate(_Values(reading), 1), "record")


def _documents(
    reading: Reading, records: Iterable[tuple[int, Any]], unit: str
) -> Iterator[Document]:
    key, names = reading.columns.key, dict[str, None]()
    keyed = key is None
    for number, record in records:
        where = f"{reading.where}: {unit} {number}" if unit else f"{reading.where}:{number}"
        try:
            if not isinstance(record, dict):
                raise ValueError(
                    f"holds a JSON {_NAMES.get(type(record), 'number')}, not an object"
                )
            document = document_of(record, reading.columns, where)
        except ValueError as error:
            hint = HINT if "has no" in str(error) else ""
            message, line = (f"{unit} {number} {error}", None) if unit else (str(error), number)
            reading.fault(message, line, hint)
        else:
            keyed = keyed or key in record
            if not keyed and len(names) < MAX_NAMES:
                names.update(dict.fromkeys(record))
            yield document
    if names and not keyed and not reading.num_faults:
        reading.fail(missing_key(reading.columns, names))


def _lines(reading: Reading) -> Iterator[tuple[int, Any]]:
    parse = _decoder().decode
    for number, line in reading.lines():
        if not line.strip():
            continue
        try:
            record = parse(line)
        except json.JSONDecodeError as error:
            column = min(error.pos, len(line.rstrip())) + 1
            reading.fault(f"is not JSON: {error.msg} at column {column:,}", number)
        except (ValueError, RecursionError) as error:
            reading.fault(_unread(error), number)
        else:
            yield number, record


class _Values:
    """The values of a JSON list, or those that stand one after the other. What is no JSON ends it,
    since nothing tells where the next value begins."""

    def __init__(self, reading: Reading) -> None:
        self._reading, self._blocks = reading, reading.text()
        self._text, self._at, self._line = "", 0, 1

    def __iter__(self) -> Iterator[Any]:
        parse = _decoder().raw_decode
        listed = self._next() == "["
        if listed:
            self._go_to(self._at + 1)
        first = True
        while (character := self._next()) and character != "]":
            if listed and not first:
                if character != ",":
                    self._fail("Expecting ',' delimiter", self._at)
                self._go_to(self._at + 1)
                self._next()
            yield self._value(parse)
            first = False
        if listed and not character:
            self._fail("the list has no end", self._at)
        if character:
            self._go_to(self._at + 1)
            if not listed or self._next():
                self._fail("Extra data", self._at)

    def _value(self, parse: Any) -> Any:
        while True:
            try:
                value, end = parse(self._text, self._at)
            except json.JSONDecodeError as error:
                # It may go on: what is wrong stands at the end, or is a text without one.
                size = len(self._text) - self._at
                cut = error.pos > len(self._text) - _TOKEN or error.msg.startswith("Unterminated")
                if cut and size > MAX_RECORD:
                    self._reading.fail(f"has a record of more than {MAX_RECORD >> 20} MiB")
                if not cut or not self._more(size):
                    self._fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                self._reading.fail(_unread(error), self._line)
            else:
                self._go_to(end)
                return value

    def _next(self) -> str:
        """The next character that is no white space, empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._go_to(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1):
                return ""

    def _more(self, least: int) -> bool:
        """Have ``least`` more characters, if there are so many; whether there are any."""
        parts, size = [self._text[self._at :]], 0
        while size < least and (block := next(self._blocks, "")):
            parts.append(block)
            size += len(block)
        self._text, self._at = "".join(parts), 0
        return size > 0

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._at, place)
        self._at = place

    def _fail(self, message: str, place: int) -> None:
        line = self._line + self._text.count("\n", self._at, place)
        hint = "a list of objects, or one object a line, is read"
        self._reading.fail(f"is not JSON: {message}", line, hint)


_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = 16
"""More characters than the longest token that is cut at the end of a text: ``-Infinity``."""

_NAMES = {list: "list", str: "string", bool: "truth value", type(None): "null"}


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=object_of, parse_int=whole_number)


def _unread(error: Exception) -> str:
    return "is nested too deep" if isinstance(error, RecursionError) else str(error)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Raises ValueError where two have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"has {twice!r} twice")
    return found
