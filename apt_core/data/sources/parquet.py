"""``dataset:parquet``: tables as columns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.files import INSTALL
from apt_core.data.sources.reading import BLOCK, Reading
from apt_core.data.sources.records import columns_to_read, read_record
from apt_core.error_text import one_line
from apt_core.providers.documents import Document

BATCH_BYTES = 4 << 20
"""About how much of a file is decoded at a time."""


class ParquetTable(FileSource):
    """Reads the columns of a table that ``data.columns`` names, a batch of rows at a time. Strings
    may be stored as such or as bytes of UTF-8."""

    name = "parquet"
    suffixes = (".parquet",)

    def reader(self, suffix: str) -> Reader:
        return read_parquet


def read_parquet(reading: Reading) -> Iterator[Document]:
    """The document of each row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        reading.fail("reading parquet needs pyarrow, which is not installed", hint=INSTALL)
    with ExitStack() as stack:
        stream: Any = stack.enter_context(reading.open())
        if reading.file.compression:
            # Its directory is at its end: it is unpacked to the disk.
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, unpacked, BLOCK)
            stream = unpacked
            stream.seek(0)
        if not stream.read(1):
            return
        try:
            table = parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
            used = columns_to_read(table.schema_arrow.names, reading)
            number = 0
            for batch in table.iter_batches(_rows_a_batch(table.metadata), columns=used):
                for record in rows_of(batch, pyarrow):
                    number += 1
                    document = read_record(record, reading, number)
                    if document is not None:
                        yield document
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reading.fail(f"is no parquet file that can be read: {one_line(error)}")


def _rows_a_batch(metadata: Any) -> int:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    widest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return int(min(max(1, BATCH_BYTES // max(1, widest)), 4096))


def rows_of(batch: Any, pyarrow: Any) -> Iterator[dict[str, Any]]:
    """The rows, their strings as bytes: arrow does not look whether they are UTF-8."""
    columns = []
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_string(column.type):
            column = column.cast(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())
        columns.append(column.to_pylist())
    names = batch.schema.names
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
