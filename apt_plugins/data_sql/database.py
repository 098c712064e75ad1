"""Connections that only read, and the rows of a query, a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoSuchModuleError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

from apt_core import ConfigError, Problem
from apt_core.error_text import shown
from apt_core.secrets import SecretValues, is_secret_name
from apt_plugins.data_sql.queries import without_end

INSTALL = 'pip install "apt-kernel[data_sql]"'

BATCH_BYTES = 4 << 20
"""About how much a batch of rows is to hold."""

FIRST_ROWS = 16
"""Rows of the first batch, from which the size of a row is learned."""

SNAPSHOT = {"isolation_level": "REPEATABLE READ"}
OPTIONS: dict[str, dict[str, Any]] = {
    "postgresql": {**SNAPSHOT, "postgresql_readonly": True},
    "mysql": SNAPSHOT,
    "mariadb": SNAPSHOT,
}
"""Options of a transaction that sees one state of the data and, where it is an option, reads."""

READ_ONLY = {
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "oracle": "SET TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}
"""What makes a new connection one that only reads, where no option does."""


class ConnectionLostError(Exception):
    """The connection died: what it was reading may be read again on another one."""


class Database:
    """The database at a URL. ``key`` is the profile's section that names it.

    Errors of the driver become ConfigError, without the secrets of the URL.
    """

    def __init__(self, url: str, key: str) -> None:
        self.key = key
        try:
            self.url: URL = sqlalchemy.make_url(url)
        except (ArgumentError, ValueError):
            hint = "it is DIALECT+DRIVER://USER:PASSWORD@HOST:PORT/NAME"
            self.fail("is no URL of a database", hint=hint)
        self._secrets = SecretValues()
        self._secrets.add([self.url.password])
        options = self.url.query.items()
        hidden = {name for name, _ in options if is_secret_name(name) or "pass" in name.lower()}
        for name in hidden:
            value = self.url.query[name]
            self._secrets.add([value] if isinstance(value, str) else value)
        self._options = {name: value for name, value in options if name not in hidden}
        if self.url.get_backend_name() == "sqlite":
            self._require_file()

    @property
    def where(self) -> str:
        """The URL without its secrets."""
        if self.url.get_backend_name() == "sqlite":
            return str(self.url.database)
        return self._shown(self.url.username)

    @property
    def place(self) -> str:
        """The URL without the user, for what is to stay the same for another one; with its other
        options, of which one may be the host."""
        return self._shown(options=self._options)

    def _shown(self, username: str | None = None, options: Any = None) -> str:
        url = self.url
        return URL.create(
            url.drivername, username, None, url.host, url.port, url.database, options or {}
        ).render_as_string()

    def fail(self, message: str, setting: str = "url", hint: str = "") -> NoReturn:
        """Raise ConfigError about one of the settings."""
        raise ConfigError(Problem(message, f"{self.key}.{setting}", hint=hint)) from None

    @contextmanager
    def result(
        self, query: str, setting: str, batch_rows: int
    ) -> Iterator[tuple[list[str], Iterator[Sequence[Any]]]]:
        """The names of the columns and the rows, in a transaction that is undone at the end.

        Raises ConfigError for a database that cannot be reached and a query that fails,
        ConnectionLostError for a connection that died.
        """
        engine = self._engine()
        try:
            with self._connected(engine) as connection:
                found = self._execute(connection, query, setting)
                names = list(found.keys())
                yield names, self._rows(found, setting, batch_rows)
        finally:
            engine.dispose()

    def _require_file(self) -> None:
        path = self.url.database
        if not path or path == ":memory:":
            self.fail("is an empty database in memory", hint="give its file: sqlite:///PATH")
        # The driver would make an empty file.
        if not path.startswith("file:") and not os.path.isfile(path):
            hint = "a relative path is looked for in the working directory; sqlite:////PATH is an "
            self.fail(f"there is no file {path!r}", hint=f"{hint}absolute one")

    def _engine(self) -> Any:
        backend = self.url.get_backend_name()
        try:
            engine = sqlalchemy.create_engine(self.url, poolclass=NullPool, hide_parameters=True)
        except NoSuchModuleError:
            self.fail(
                f"SQLAlchemy has no dialect {self.url.drivername!r}",
                hint="install the package that brings it, or correct the name",
            )
        except ImportError as error:
            hint = f"install the driver; {INSTALL} brings that of postgresql+psycopg"
            self.fail(f"{self.url.drivername!r} needs a driver: {shown(error)}", hint=hint)
        except (SQLAlchemyError, TypeError, ValueError) as error:
            self.fail(f"cannot be used: {shown(error)}")
        if engine.dialect.is_async:
            self.fail(f"{self.url.drivername!r} is an asynchronous driver", hint="name another one")

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            if statement := READ_ONLY.get(backend):
                cursor = connection.cursor()
                cursor.execute(statement)
                cursor.close()
            if backend == "sqlite":
                # It may hold any bytes as text, and would raise where they are no UTF-8.
                connection.text_factory = bytes

        return engine

    @contextmanager
    def _connected(self, engine: Any) -> Iterator[Any]:
        try:
            connection = engine.connect()
            options = OPTIONS.get(engine.dialect.name, {})
            connection = connection.execution_options(**options)
        except Exception as error:  # drivers raise what they like
            self.fail(f"cannot connect to {self.where}: {_reason(error)}")
        try:
            yield connection
        finally:
            with suppress(Exception):  # of a dead one
                connection.close()

    def _execute(self, connection: Any, query: str, setting: str) -> Any:
        try:
            found = connection.execution_options(
                stream_results=True, max_row_buffer=1, no_parameters=True
            ).exec_driver_sql(without_end(query))
        except Exception as error:
            self._raise_lost(error)
            self.fail(f"{self.where} refuses it: {_reason(error)}", setting)
        if not found.returns_rows:
            self.fail("gives no rows at all", setting)
        return found

    def _rows(self, found: Any, setting: str, batch_rows: int) -> Iterator[Sequence[Any]]:
        size, number = min(FIRST_ROWS, batch_rows), 0
        while True:
            try:
                batch = found.fetchmany(size)
            except Exception as error:
                self._raise_lost(error)
                self.fail(f"failed after row {number:,}: {_reason(error)}", setting)
            if not batch:
                return
            num_bytes = 1
            for row in batch:
                number += 1
                values = [bytes(v) if isinstance(v, memoryview) else v for v in row]
                num_bytes += sum(len(v) if isinstance(v, str | bytes) else 32 for v in values)
                yield values
            size = max(1, min(batch_rows, BATCH_BYTES * len(batch) // num_bytes))

    def _raise_lost(self, error: Exception) -> None:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise ConnectionLostError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """What the driver says, without SQLAlchemy's frame around it."""
    original = getattr(error, "orig", None)
    return shown(original if original is not None else error) or type(error).__name__
