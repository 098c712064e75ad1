"""The texts in a column of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from apt_core import ConfigError
from apt_core.providers import DatasetProvider


class Provider(DatasetProvider):
    """``dataset:my_plugin``: each row of ``data.train_path`` is a document."""

    name = "my_plugin"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.column = "text" if config is None else config.column

    def documents(self) -> Iterator[str]:
        path = self.data_section.train_path
        if not isinstance(path, str):
            raise ConfigError("names the CSV file", "data.train_path")
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if self.column not in (reader.fieldnames or ()):
                raise ConfigError(f"{path} has no column {self.column!r}", "my_plugin.column")
            for row in reader:
                yield row[self.column] or ""
