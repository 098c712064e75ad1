"""``dataset:csv``: tables as text, the first row names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.reading import MAX_RECORD, Reading
from apt_core.data.sources.records import columns_to_read, read_record
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
    taken: list[int] = []  # the numbers of the lines of a row

    def lines() -> Iterator[str]:
        for number, line in reading.lines():
            taken.append(number)
            yield line

    rows = csv.reader(
        lines(),
        delimiter="\t" if reading.file.suffix == ".tsv" else ",",
        strict=True,
    )
    names: list[str] = []
    try:
        for row in rows:
            first = taken[0]
            taken.clear()
            if not row or not (names or any(map(str.strip, row))):
                continue
            if not names:
                names = row
                used = columns_to_read(names, reading, first)
                continue
            if len(row) != len(names):
                reading.fault(f"has {len(row):,} cells, the first row {len(names):,}", first)
                continue
            values = dict(zip(names, row, strict=True))
            document = read_record({name: values[name] for name in used}, reading, first)
            if document is not None:
                yield document
    except csv.Error as error:
        begins = f" in the row that begins in line {taken[0]:,}" if taken else ""
        reading.fail(f"is no CSV: {error}{begins}", taken[-1] if taken else None)
