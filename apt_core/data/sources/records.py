"""Documents out of records: rows and objects with named fields."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from apt_core.data.sources.faults import Faults
from apt_core.errors import did_you_mean
from apt_core.json_files import whole_number
from apt_core.providers.dataset import Columns
from apt_core.providers.documents import Document

HINT = "data.columns says under which names records hold their text, prompt, response and messages"


def document_of(record: Mapping[str, Any], columns: Columns, where: str) -> Document:
    """The document of a record: its messages, else its prompt with its response, else its text.

    A field that is null is not there. Raises ValueError for a record without any of these, and
    for values that are no text or no conversation.
    """
    given: dict[str, Any] = {}
    if (messages := record.get(columns.messages)) is not None:
        given["messages"] = messages
    elif (prompt := record.get(columns.prompt)) is not None and (
        response := record.get(columns.response)
    ) is not None:
        given["prompt"], given["response"] = prompt, response
    elif (text := record.get(columns.text)) is not None:
        if type(text) is str and columns.key is None:  # the most frequent, by far
            return Document.of(text, where)
        given["text"] = text
    else:
        raise ValueError(missing_fields(columns, record, record))
    if columns.key is not None:
        given["key"] = record.get(columns.key)
    try:
        return Document.of(given, where)
    except ValueError as error:
        raise ValueError(_in_terms_of(columns, str(error))) from None


def read_record(record: dict[str, Any], faults: Faults, number: int) -> Document | None:
    """The document of row ``number`` of a table, in which texts may be bytes of UTF-8, and messages
    a text of JSON; None, the fault noted, where it is none."""
    before = faults.num_faults
    for name, value in record.items():
        if isinstance(value, bytes | bytearray | memoryview):
            record[name] = faults.decoded(bytes(value), line=number)
    if faults.num_faults > before:
        return None
    columns = faults.columns
    try:
        if isinstance(messages := record.get(columns.messages), str):
            record[columns.messages] = json.loads(messages or "null", parse_int=whole_number)
        return document_of(record, columns, faults.place(number))
    except (ValueError, RecursionError) as error:
        faults.fault(str(error), number)
        return None


def columns_to_read(names: Sequence[str], faults: Faults, line: int | None = None) -> list[str]:
    """The columns of a table to read. Raises ConfigError where it has none of the forms of a
    document, and where one of them stands there twice."""
    used = usable_columns(faults.columns, names)
    if not used:
        faults.fail(missing_fields(faults.columns, names), line, HINT)
    if faults.columns.key is not None and faults.columns.key not in names:
        faults.fail(missing_key(faults.columns, names), line)
    if twice := [name for name in used if list(names).count(name) > 1]:
        faults.fail(f"has the column {twice[0]!r} twice", line)
    return used


def usable_columns(columns: Columns, there: Collection[str]) -> list[str]:
    """The columns of a table to read, of those that are ``there``; empty where none of the forms of
    a document is."""
    pair = (columns.prompt, columns.response)
    names = [columns.messages] if columns.messages in there else []
    names += pair if all(name in there for name in pair) else ()
    names += [columns.text] if columns.text in there else []
    if names and columns.key is not None and columns.key in there:
        names.append(columns.key)
    return list(dict.fromkeys(names))


def missing_key(columns: Columns, there: Collection[str]) -> str:
    """That the key is not among the names that are ``there``."""
    assert columns.key is not None
    hint = did_you_mean(columns.key, there)
    return f"has no {columns.key!r}, which data.columns.key names{f': {hint}' if hint else ''}"


def _in_terms_of(columns: Columns, message: str) -> str:
    """``message`` about a field, with the name that it has in the record."""
    field = message.split("'")[1] if message.startswith("'") else ""
    name = getattr(columns, field, field)
    return message.replace(repr(field), repr(name), 1) if field else message


def missing_fields(
    columns: Columns, there: Collection[str], record: Mapping[str, Any] | None = None
) -> str:
    """What is missing, and what is there."""
    null = [name for name in there if record is not None and record[name] is None]
    names = ", ".join(f"{name!r}{' (null)' if name in null else ''}" for name in list(there)[:20])
    names += f" and {len(there) - 20:,} more" if len(there) > 20 else ""
    wanted = (columns.text, columns.messages, columns.prompt, columns.response)
    likely = [did_you_mean(name, wanted) for name in list(there)[:20] if name not in wanted]
    hint = next(filter(None, likely), "")
    return (
        f"has no {columns.text!r}, no {columns.prompt!r} with {columns.response!r}, and no "
        f"{columns.messages!r}; it has {names or 'nothing'}{f': {hint}' if hint else ''}"
    )
