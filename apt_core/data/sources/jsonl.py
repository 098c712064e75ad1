"""``dataset:jsonl``: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.reading import Reading
from apt_core.data.sources.records import HINT, document_of, missing_key
from apt_core.providers.documents import Document

JSON_LINES = (".jsonl", ".ndjson")

MAX_NAMES = 1000
"""So many names of fields are kept to suggest one."""


class JsonLines(FileSource):
    """Reads files of JSON lines, whatever their suffix: in each line ``text``, ``prompt`` and
    ``response``, or ``messages`` with roles, by the names that ``data.columns`` gives."""

    name = "jsonl"
    suffixes = JSON_LINES

    def reader(self, suffix: str) -> Reader:
        return read_jsonl


def read_jsonl(reading: Reading) -> Iterator[Document]:
    """The document of each line; empty lines are left out. Some records may have no key, but not
    all."""
    key, names = reading.columns.key, dict[str, None]()
    keyed = key is None
    parse = json.JSONDecoder(object_pairs_hook=object_of, parse_int=_number).decode
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
        except _LongNumberError:
            reading.fault("holds a number of more than 1,000 digits", number)
        except ValueError as error:
            reading.fault(str(error), number, HINT if "has no" in str(error) else "")
        else:
            keyed = keyed or key in record
            if not keyed and len(names) < MAX_NAMES:
                names.update(dict.fromkeys(record))
            yield document
    if names and not keyed and not reading.num_faults:
        reading.fail(missing_key(reading.columns, names))


_NAMES = {list: "list", str: "string", bool: "truth value", type(None): "null"}


class _LongNumberError(Exception):
    """A number that takes long to read, and that no document has."""


def _number(digits: str) -> int:
    if len(digits) > 1000:
        raise _LongNumberError
    return int(digits)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Raises ValueError where two have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"has {twice!r} twice")
    return found
