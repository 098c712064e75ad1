"""What sources of rows that are no files have in common: their settings, and what is wrong in a
row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from apt_core.data.sources.faults import Faults
from apt_core.data.sources.records import read_record
from apt_core.providers.base import read_settings
from apt_core.providers.dataset import DatasetProvider, MixtureItem
from apt_core.providers.documents import Document
from apt_core.sections import Section

Settings = TypeVar("Settings", bound=Section)


class RowFaults(Faults):
    """The rows of a table or query while they are read, and what was found to be wrong with
    them."""

    unit = "rows"

    def place(self, line: int) -> str:
        return f"{self.where}, row {line:,}"


class RowSource(DatasetProvider, Generic[Settings]):
    """Reads rows, with settings in a section of their own.

    A subclass names the ``model`` of its settings and the ``section`` of the profile that holds
    them; in a mixture they stand under ``settings`` of the item. ``replaced`` counts the bytes that
    ``errors: replace`` has replaced by U+FFFD so far.
    """

    model: type[Settings]
    section: ClassVar[str]
    replaced = 0

    @property
    def settings(self) -> Settings:
        """The settings of this source. Raises ValueError for what is wrong with them."""
        return read_settings(self.model, self.config, self.settings_key)

    @property
    def settings_key(self) -> str:
        """The key of the profile that holds the settings."""
        if isinstance(self.data_section, MixtureItem):
            return f"{self.data_key}.settings"
        return self.section

    def documents_of(
        self, rows: Iterable[tuple[int, dict[str, Any]]], faults: Faults
    ) -> Iterator[Document]:
        """The document of each of the numbered ``rows``. Raises ConfigError with all rows that are
        none."""
        for number, record in rows:
            document = read_record(record, faults, number)
            if document is not None and not faults.num_faults:
                yield document
        faults.raise_faults()
        self.replaced += faults.replaced

    def decisive(self, *names: str) -> Mapping[str, Any]:
        """What decides the documents of the same rows, with the settings of these ``names``."""
        section = self.data_section
        return {
            "columns": section.columns.model_dump(),
            "errors": section.errors,
            **self.settings.model_dump(include=set(names)),
        }
