"""The section ``data_sql`` of the profile, and what is wrong with a query before it is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field, SecretStr

from apt_core import Problem
from apt_core.providers.base import read_settings
from apt_core.providers.dataset import MixtureItem
from apt_core.sections import Name, Section
from apt_plugins.data_sql.queries import fault_of

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "data_sql"
PROVIDER = "sql"


_URL = re.compile(r"[A-Za-z]\w*(\+\w+)?://")


Sql = Annotated[str, Field(max_length=1_000_000)]


class SqlSettings(Section):
    """``data_sql``: which database is asked, and what."""

    url: SecretStr = Field(
        default=SecretStr(""),
        description="URL of the database as SQLAlchemy takes it: DIALECT+DRIVER://USER@HOST/NAME, "
        "or sqlite:///PATH. It may hold a password, so that nothing shows it.",
    )
    query: Sql = Field(
        default="",
        description="The SELECT whose rows are the documents to train on, with an ORDER BY that "
        "decides the place of each row. data.columns names its columns.",
    )
    val_query: Sql = Field(
        default="",
        description="The SELECT of the documents to evaluate on; without it val_fraction is held "
        "out.",
    )
    batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=1000,
        description="The most rows that are fetched at a time; fewer where rows are large.",
    )
    version: Name | None = Field(
        default=None,
        description="Names the state of the data: while it is the same, runs share one store and "
        "do not ask the database. Without it, each run reads all rows.",
    )


def wrong(settings: SqlSettings, key: str = SECTION) -> Iterator[Problem]:
    """What keeps a source from being read, as far as that can be told without a database."""
    url = settings.url.get_secret_value()
    if not _URL.match(url):
        hint = "give one such as sqlite:///corpus.db or postgresql+psycopg://USER@HOST/NAME"
        message = "is no URL of a database" if url else "no database is named"
        yield Problem(message, f"{key}.url", hint=hint)
    if not settings.query:
        hint = "give one such as SELECT text FROM documents ORDER BY id"
        yield Problem("there is no query", f"{key}.query", hint=hint)
    for name in ("query", "val_query"):
        if query := getattr(settings, name):
            message, hint = fault_of(query)
            if message:
                yield Problem(message, f"{key}.{name}", hint=hint)


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of the sources that the profile uses, those of its mixture included."""
    for place, section in config.data.sections():
        if section.dataset_name != PROVIDER:
            continue
        key, given = SECTION, cast("Any", config.section(SECTION))
        if isinstance(section, MixtureItem):
            key, given = f"{place}.settings", section.settings
        # What is wrong with one of the settings of an item is told of all sources alike.
        with suppress(ValueError):
            yield from wrong(read_settings(SqlSettings, given, key), key)
