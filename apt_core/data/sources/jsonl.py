"""``dataset:jsonl``: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.reading import Reading
from apt_core.data.sources.records import HINT, document_of
from apt_core.providers.documents import Document

JSON_LINES = (".jsonl", ".ndjson")


class JsonLines(FileSource):
    """Reads files of JSON lines, whatever their suffix: in each line ``text``, ``prompt`` and
    ``response``, or ``messages`` with roles, by the names that ``data.columns`` gives."""

    name = "jsonl"
    suffixes = JSON_LINES

    def reader(self, suffix: str) -> Reader:
        return read_jsonl


def read_jsonl(reading: Reading) -> Iterator[Document]:
    """The document of each line; empty lines are left out."""
    parse = json.JSONDecoder(object_pairs_hook=object_of).decode
    for number, line in reading.lines():
        if not line.strip():
            continue
        try:
            record = parse(line)
            if not isinstance(record, dict):
                raise ValueError(
                    f"holds a JSON {_NAMES.get(type(record), 'number')}, not an object"
                )
            document = document_of(record, reading.columns, f"{reading.where}:{number}")
        except json.JSONDecodeError as error:
            column = min(error.pos, len(line.rstrip())) + 1
            reading.fault(f"is not JSON: {error.msg} at column {column:,}", number)
        except RecursionError:
            reading.fault("is nested too deep", number)
        except ValueError as error:
            reading.fault(str(error), number, HINT if "has no" in str(error) else "")
        else:
            yield document


_NAMES = {list: "list", str: "string", bool: "truth value", type(None): "null"}


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Raises ValueError where two have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"has {twice!r} twice")
    return found
