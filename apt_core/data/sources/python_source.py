"""``dataset:python_source``: the standard library of this Python, code without a download."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator

from apt_core.data.sources.files import Found, find_files
from apt_core.data.sources.reading import Reading
from apt_core.data.sources.text_default import TextDataset
from apt_core.errors import ConfigError, Problem
from apt_core.providers.documents import Document

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders at any depth: tests hold what no one writes, and what is installed differs."""

KEY = "data.source"


class PythonSource(TextDataset):
    """The modules of CPython's standard library in order of path, about 12 MB of code.

    Files without code are left out. The text differs between Python versions: compare figures
    only where the fingerprint is the same. ``val_path`` may name files to evaluate on.
    """

    name = "python_source"

    def documents(self) -> Iterator[Document]:
        """A document for each module. Raises ConfigError where this Python has no sources, and for
        one that cannot be read."""
        folder = _folder()
        for file in self.found("source").files:
            with Reading(file, KEY).open() as stream:
                data = stream.read()
            where = f"lib:{os.path.relpath(file.path, folder)}"
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
                text = data.decode(encoding)
            except (SyntaxError, ValueError) as error:
                raise ConfigError(Problem(f"is no Python: {error}", KEY, where)) from error
            if text.strip():
                yield Document(text=text, where=where)

    def fingerprint(self) -> str | None:
        """The hash of all modules, and of the files of ``val_path``."""
        facts = [self.get_name(), self._contents("source"), self._contents("val_path")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def describe(self) -> str:
        """Says which Python's modules these are."""
        found = self.found("source")
        text = (
            f"the standard library of Python {platform.python_version()} "
            f"({len(found.files):,} modules, {found.num_bytes / 1e6:.1f} MB)"
        )
        if self.section.val_path is not None:
            text += f"; validated on {self._described('val_path')}"
        return text

    def _find(self, key: str) -> Found:
        if key != "source":
            return super()._find(key)
        return find_files(_folder(), (".py",), KEY, without=LEFT_OUT)


def _folder() -> str:
    return sysconfig.get_path("stdlib")
