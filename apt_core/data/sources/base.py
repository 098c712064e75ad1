"""What all sources that read files have in common."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import TypeAlias

from apt_core.code_source import short_path
from apt_core.data.sources.digests import bytes_to_hash, kept_sha256
from apt_core.data.sources.files import Found, find_files
from apt_core.data.sources.reading import Reading
from apt_core.errors import ConfigError, Problem
from apt_core.log import get_logger
from apt_core.printable import printable
from apt_core.providers.base import read_settings
from apt_core.providers.dataset import DataSection, DatasetProvider, SourceSection
from apt_core.providers.documents import Document

log = get_logger("apt.data")

Reader: TypeAlias = Callable[[Reading], Iterator[Document]]
"""Yields the documents of a file; what is wrong is noted in the Reading or raised."""

FORMAT = 3
"""Counts the changes of what readers make of the same bytes."""


class FileSource(DatasetProvider):
    """Reads the files of ``train_path`` and, to validate on, of ``val_path``.

    ``suffixes`` are those that are read in a folder. ``replaced`` counts the bytes that
    ``errors: replace`` has replaced by U+FFFD so far.
    """

    suffixes: Collection[str] = ()
    replaced = 0
    _reading: Reading | None = None

    @abstractmethod
    def reader(self, suffix: str) -> Reader:
        """What reads files of ``suffix``, lower case, without that of a compression."""

    @property
    def section(self) -> SourceSection:
        """The settings that name the files."""
        if isinstance(self.config, SourceSection):
            return self.config
        if self.config is None:
            return self.data_section
        return read_settings(DataSection, self.config, "data")

    def documents(self) -> Iterator[Document]:
        """The documents of ``train_path``. Raises ConfigError with all that is wrong with a file,
        each problem with its line or byte; for a file that the profile names and that holds no
        text; and where no file holds any."""
        return self._documents("train_path")

    def held_out(self) -> Iterator[Document] | None:
        """The documents of ``val_path``, as :meth:`documents` yields those of ``train_path``."""
        return None if self.section.val_path is None else self._documents("val_path")

    def fingerprint(self) -> str | None:
        """The hash of the contents of all files and of what decides how they are read; it stays
        the same where files are only renamed or moved. Raises ConfigError for what cannot be
        read."""
        section = self.section
        facts = {
            "format": FORMAT,
            "source": self.get_name(),
            "columns": section.columns.model_dump(),
            "errors": section.errors,
            **{key: self._contents(key) for key in ("train_path", "val_path")},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def bytes_to_hash(self) -> int:
        keys = [key for key in ("train_path", "val_path") if getattr(self.section, key) is not None]
        return sum(bytes_to_hash(self.found(key).files) for key in keys)

    def describe(self) -> str:
        """The paths, with how many files there are and their size."""
        text = self._described("train_path")
        if self.section.val_path is None:
            return text
        if self.section.val_path == self.section.train_path:
            return f"{text}; validated on the same text, so not on unseen text"
        return f"{text}; validated on {self._described('val_path')}"

    def num_bytes(self) -> int | None:
        """The size of all files, compressed as they are; of some URLs it cannot be told."""
        keys = [key for key in ("train_path", "val_path") if getattr(self.section, key) is not None]
        sizes = [file.size for key in keys for file in self.found(key).files]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def share_read(self) -> float | None:
        """The share of the bytes of all files; of some URLs it cannot be told."""
        size = self.num_bytes()
        if not size:
            return None
        read = sum(self._read.values()) + (self._reading.position if self._reading else 0)
        return min(1.0, read / size)

    @cached_property
    def _read(self) -> dict[str, int]:
        """The bytes of the files of each key that were read to their end."""
        return {}

    def found(self, key: str) -> Found:
        """The files of ``train_path`` or ``val_path``, as they were at the first call. Raises
        ConfigError for what is not there."""
        known: dict[str, Found] = self.__dict__.setdefault("_found", {})
        if key not in known:
            found = self._find(key)
            if found.problems:
                raise ConfigError(found.problems)
            known[key] = found
        return known[key]

    def _find(self, key: str) -> Found:
        paths = getattr(self.section, key)
        if paths is None and key == "train_path":
            raise ConfigError(
                Problem(
                    "no text to train on",
                    key=self._key(key),
                    hint="give a file, a folder, a pattern or a URL, or set data.source to pydoc",
                )
            )
        return find_files(paths or [], self.suffixes, self._key(key))

    def _documents(self, key: str) -> Iterator[Document]:
        empty: list[str] = []
        files = self.found(key).files
        if key in self._read:  # everything is read again
            self._read.clear()
        self._read[key] = 0
        section, name = self.section, self._key(key)
        for file in files:
            reading = Reading(file, name, section.columns, section.errors)
            self._reading = reading
            has_text = False
            for document in self.reader(file.suffix)(reading):
                if reading.num_faults:
                    continue
                has_text = has_text or any(map(str.strip, document.parts))
                yield document
            reading.raise_faults()
            self.replaced += reading.replaced
            self._read[key] += file.size or 0
            self._reading = None
            if not has_text:
                if file.named or len(files) == 1:
                    reading.fail("holds no text", hint="give a file with text in it")
                empty.append(reading.where)
        if empty and len(empty) == len(files):
            raise ConfigError(Problem(f"none of {len(files):,} files holds text", name, empty[0]))
        if empty:
            log.warning("%s: %s hold no text, such as %s", name, len(empty), empty[0])

    def _contents(self, key: str) -> list[tuple[str, str]]:
        files = self.found(key).files
        hashes = kept_sha256(files, self._key(key))
        return [(file.suffix, each) for file, each in zip(files, hashes, strict=True)]

    def _described(self, key: str) -> str:
        found, paths = self.found(key), getattr(self.section, key)
        shown = found.files[0].where if len(found.files) == 1 else _in_words(paths)
        files = "" if len(found.files) == 1 else f"{len(found.files):,} files, "
        known = all(file.size is not None for file in found.files)
        size = _size(found.num_bytes) if known else "of a size that its server does not tell"
        text = f"{shown} ({files}{size})"
        others = ", ".join(f"{n:,} × {suffix}" for suffix, n in sorted(found.skipped.items()) if n)
        return f"{text}, skipped: {others}" if others else text

    def _key(self, key: str) -> str:
        return f"{self.data_key}.{key}"


def _in_words(paths: str | list[str]) -> str:
    names = [paths] if isinstance(paths, str) else paths
    shown = ", ".join(printable(short_path(name), keep="") for name in names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown


def _size(num_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"
