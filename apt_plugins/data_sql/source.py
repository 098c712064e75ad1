"""``dataset:sql``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from apt_core import ConfigError, Problem
from apt_core.data.sources.faults import Faults
from apt_core.data.sources.records import columns_to_read
from apt_core.data.sources.rows import RowFaults, RowSource
from apt_core.log import get_logger
from apt_core.providers import Document
from apt_plugins.data_sql.database import ConnectionLostError, Database
from apt_plugins.data_sql.settings import PROVIDER, SECTION, SqlSettings, wrong

log = get_logger("apt.data")

FORMAT = 1
"""Counts the changes of what is made of the same rows."""

PAUSE = 1.0
"""Seconds before a lost connection is made anew."""

SHOWN_CHARACTERS = 100
"""Characters of a query in the line that describes it."""


class Rows(RowFaults):
    """The rows of a query while they are read."""

    def fault(self, message: str, line: int | None = None, hint: str = "") -> None:
        if not hint and "(null)" in message:
            hint = "leave such rows out: WHERE … IS NOT NULL"
        elif not hint and message.endswith("not a string"):
            hint = "CAST it to text in the query"
        super().fault(message, line, hint)


class SqlSource(RowSource[SqlSettings]):
    """Reads the rows of a query by a cursor of the server, so that memory does not grow with their
    number, in a transaction that only reads, where the database has one.

    Columns are named by ``data.columns``; texts may be bytes of UTF-8, ``messages`` a text of JSON.
    A row whose document is NULL is an error, and so are values that are no text.
    """

    name = PROVIDER
    model = SqlSettings
    section = SECTION

    def documents(self) -> Iterator[Document]:
        """The rows of ``query``. Raises ConfigError with all rows that are no documents, and for a
        database or query that fails; where a connection dies, unless a new one gives the rows that
        were read once more, and so can go on after them."""
        return self._documents("query")

    def held_out(self) -> Iterator[Document] | None:
        """The rows of ``val_query``, as :meth:`documents` yields those of ``query``."""
        return self._documents("val_query") if self.settings.val_query else None

    def fingerprint(self) -> str | None:
        """The hash of all settings that decide the documents, where ``version`` names the state of
        the data, else None: no database tells cheaply whether rows have changed."""
        settings = self.settings
        if settings.version is None:
            return None
        facts = {
            "format": FORMAT,
            "database": self._database.place,
            **self.decisive("query", "val_query", "version"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """The database, without the password, and the query."""
        settings = self.settings
        query = " ".join(settings.query.split())
        if len(query) > SHOWN_CHARACTERS:
            query = f"{query[:SHOWN_CHARACTERS]}…"
        version = f", version {settings.version}" if settings.version else ""
        return f"{self._database.where}: {query}{version}"

    @property
    def _database(self) -> Database:
        settings, key = self.settings, self.settings_key
        if problems := [*wrong(settings, key)]:
            raise ConfigError(problems)
        return Database(settings.url.get_secret_value(), key)

    def _documents(self, setting: str) -> Iterator[Document]:
        database, section = self._database, self.data_section
        key, found = f"{self.settings_key}.{setting}", False
        faults = Rows(database.where, key, section.columns, section.errors)
        for document in self.documents_of(self._records(database, setting, faults), faults):
            found = True
            yield document
        if not found:
            raise ConfigError(Problem("gives no rows", key, database.where))

    def _records(
        self, database: Database, setting: str, faults: Faults
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows with their numbers, from 1.

        Where the connection is lost, another one reads from the first row on, once. Only if all
        rows so far come again as they were does it go on: what is yielded is then, as a whole, what
        the new transaction sees.
        """
        settings = self.settings
        query = getattr(settings, setting)
        number, so_far, lost = 0, hashlib.blake2b(), ""
        while True:
            row, again = 0, hashlib.blake2b()
            try:
                with database.result(query, setting, settings.batch_rows) as (names, rows):
                    used = columns_to_read(names, faults)
                    places = [names.index(name) for name in used]
                    for row, values in enumerate(rows, 1):
                        read = [values[place] for place in places]
                        if row > number:
                            number = row
                            _update(so_far, read)
                            yield number, dict(zip(used, read, strict=True))
                            continue
                        _update(again, read)
                        if row == number and again.digest() != so_far.digest():
                            faults.fail(f"{lost}, and another one gives other rows before", number)
            except ConnectionLostError as error:
                if lost:
                    faults.fail(f"{lost}, and once more on another one ({error})", row)
                lost = f"the connection was lost after this row ({error})"
                where = faults.place(number)
                log.warning("%s: %s: reading once more, from the first row on", where, lost)
                time.sleep(PAUSE)
            except ConfigError as error:
                if not lost or row or faults.num_faults:
                    raise
                faults.fail(f"{lost}, and there is no other: {error}", number)
            else:
                if row < number:
                    faults.fail(f"{lost}, and another one gives {row:,} rows", number)
                return


def _update(digest: Any, values: Sequence[Any]) -> None:
    digest.update(repr(values).encode("utf-8", "backslashreplace"))
