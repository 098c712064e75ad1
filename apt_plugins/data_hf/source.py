"""``dataset:hf_datasets``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from apt_core import ConfigError
from apt_core.data.sources.digests import bytes_to_hash, kept_sha256
from apt_core.data.sources.files import DataFile, find_files
from apt_core.data.sources.parquet import rows_of
from apt_core.data.sources.records import columns_to_read
from apt_core.data.sources.rows import RowFaults, RowSource
from apt_core.error_text import one_line
from apt_core.providers import Document
from apt_plugins.data_hf.loading import FORMATS, Opening
from apt_plugins.data_hf.settings import PROVIDER, SECTION, HfSettings, wrong

FORMAT = 1
"""Counts the changes of what is made of the same rows."""

BATCH_ROWS = 64
"""Rows that are in memory at a time."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HfSource(RowSource[HfSettings]):
    """Reads a dataset of Hugging Face: ``data.train_path`` is a folder that ``save_to_disk`` made,
    data files or a folder of them, or a name on the hub; ``data.columns`` names its columns.

    Shards are read one after the other, in their order and without a shuffle buffer. Nothing that
    is read can run code: scripts, pickles and formats other than tables and text are refused.
    """

    name = PROVIDER
    model = HfSettings
    section = SECTION

    def documents(self) -> Iterator[Document]:
        """The rows of ``split``. Raises ConfigError with all rows of a shard that are no documents,
        and for what cannot be opened."""
        return self._documents(self._opening("train_path"), self.settings.split, "split")

    def held_out(self) -> Iterator[Document] | None:
        """The rows of ``val_split``, of ``data.val_path`` where it is given."""
        settings, section = self.settings, self.data_section
        if section.val_path is not None:
            split = settings.val_split or settings.split
            setting = "val_split" if settings.val_split else "split"
            return self._documents(self._opening("val_path"), split, setting)
        if settings.val_split is None:
            return None
        return self._documents(self._opening("train_path"), settings.val_split, "val_split")

    def fingerprint(self) -> str | None:
        """The hash of the files, or the commit of a dataset on the hub, with all settings that
        decide the documents."""
        facts = {
            "format": FORMAT,
            **self.decisive("config", "split", "val_split"),
            **{key: self._content(key) for key in ("train_path", "val_path")},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def bytes_to_hash(self) -> int:
        keys = [key for key in ("train_path", "val_path") if getattr(self.data_section, key)]
        openings = [self._opening(key) for key in keys]
        return sum(bytes_to_hash(self._files(each)) for each in openings if not each.on_hub)

    def describe(self) -> str:
        """The dataset, its configuration, split and revision."""
        settings = self.settings
        parts = [settings.config, settings.split]
        parts += [f"revision {settings.revision}"] if settings.revision else []
        shown = ", ".join(part for part in parts if part)
        return f"{self._opening('train_path').name} ({shown})"

    def _opening(self, key: str) -> Opening:
        section = self.data_section
        if problems := [*wrong(section, self.data_key)]:
            raise ConfigError(problems)
        key_of_paths = f"{self.data_key}.{key}"
        return Opening(getattr(section, key), self.settings, key_of_paths, self.settings_key)

    def _documents(self, opening: Opening, split: str, setting: str) -> Iterator[Document]:
        section = self.data_section
        dataset = opening.split(split, setting)
        found = False
        num_shards = getattr(dataset, "num_shards", 1)
        for index in range(num_shards):
            shard = dataset
            where = f"{opening.name}:{split}"
            if num_shards > 1:
                shard = dataset.shard(num_shards=num_shards, index=index, contiguous=True)
                where += f", shard {index}"
            faults = RowFaults(where, opening.key, section.columns, section.errors)
            for document in self.documents_of(self._records(shard, faults), faults):
                found = True
                yield document
        if not found:
            opening.fail(f"split {split!r} has no rows")

    def _records(self, shard: Any, faults: RowFaults) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow

        names = shard.column_names
        used: list[str] = []
        number = 0
        if names:
            used = columns_to_read(names, faults)
            shard = shard.select_columns(used)
        try:
            for table in shard.with_format("arrow").iter(batch_size=BATCH_ROWS):
                used = used or columns_to_read(table.column_names, faults)
                for batch in table.select(used).to_batches():
                    for record in rows_of(batch, pyarrow):
                        number += 1
                        yield number, record
        except ConfigError:
            raise
        except Exception as error:  # files of any content
            faults.fail(f"cannot be read on: {one_line(error)}", number)

    def _content(self, key: str) -> Any:
        if getattr(self.data_section, key) is None:
            return None
        opening = self._opening(key)
        if opening.on_hub:
            revision = self.settings.revision
            if revision is not None and _COMMIT.fullmatch(revision):
                return [opening.name, revision]
            return [opening.name, opening.commit()]
        return kept_sha256(self._files(opening), opening.key)

    def _files(self, opening: Opening) -> list[DataFile]:
        found = find_files(opening.paths, [*FORMATS, ".json"], opening.key)
        if found.problems:
            raise ConfigError(found.problems)
        return found.files
