"""``dataset:csv``: tables as text, the first row names the columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.reading import MAX_RECORD, Reading
from apt_core.data.sources.records import HINT, document_of, missing_fields, usable_columns
from apt_core.providers.documents import Document

TABLES = (".csv", ".tsv")


class CsvTable(FileSource):
    """Reads comma-separated values, or tab-separated ones of .tsv, with quotes as RFC 4180 has
    them; a cell may hold line ends. ``messages`` is a column of JSON."""

    name = "csv"
    suffixes = TABLES

    def reader(self, suffix: str) -> Reader:
        return read_csv


def read_csv(reading: Reading) -> Iterator[Document]:
    """The document of each row."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))  # one limit for the process
    rows = csv.reader(
        (line for _, line in reading.lines()),
        delimiter="\t" if reading.file.suffix == ".tsv" else ",",
        strict=True,
    )
    columns = reading.columns
    names: list[str] = []
    number = 1
    try:
        for row in rows:
            first, number = number, rows.line_num + 1
            if not row or not (names or any(map(str.strip, row))):
                continue
            if not names:
                names = row
                _check_names(reading, names, first)
                used = usable_columns(columns, names)
                continue
            if len(row) != len(names):
                reading.fault(f"has {len(row):,} cells, the first row {len(names):,}", first)
                continue
            values = dict(zip(names, row, strict=True))
            try:
                record: dict[str, Any] = {name: values[name] for name in used}
                if columns.messages in record:
                    record[columns.messages] = json.loads(record[columns.messages] or "null")
                yield document_of(record, columns, f"{reading.where}:{first}")
            except (ValueError, RecursionError) as error:
                reading.fault(str(error), first)
    except csv.Error as error:
        reading.fail(f"is no CSV: {error}", rows.line_num)


def _check_names(reading: Reading, names: list[str], line: int) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    used = usable_columns(reading.columns, names)
    if not used:
        reading.fail(missing_fields(reading.columns, names), line, HINT)
    if both := [name for name in twice if name in used]:
        reading.fail(f"has the column {both[0]!r} twice", line)
