"""Finds documents that repeat earlier ones, in bounded memory: what was seen is on disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from apt_core.data.pipeline.minhash import band_hashes, band_rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CACHE_KIB = 64 << 10
"""The memory that the table of each kind may take."""

NAME = "seen.sqlite"


class SeenDocuments:
    """The documents that were kept so far, in a file of ``folder``.

    The first of several stays, so that documents have to come in their order. Raises OSError where
    the disk is full.
    """

    def __init__(self, folder: Path, near_threshold: float | None = None) -> None:
        self._path = folder / NAME
        self._threshold = near_threshold or 0.0
        self._rows = band_rows(self._threshold)
        self._database = sqlite3.connect(self._path, isolation_level=None)
        # A build that is cut short begins anew: nothing here has to outlive it.
        for setting in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "locking_mode=EXCLUSIVE",
            "temp_store=MEMORY",
            f"cache_size=-{CACHE_KIB}",
        ):
            self._run(f"PRAGMA {setting}")
        self._run("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._run("CREATE TABLE bands (band INTEGER PRIMARY KEY, document INTEGER)")
        self._run("CREATE TABLE signatures (document INTEGER PRIMARY KEY, signature BLOB)")
        self._run("BEGIN")

    def repeats(self, digest: bytes) -> bool:
        """Whether a document of this digest was seen; from now on it is."""
        return self._run("INSERT OR IGNORE INTO digests VALUES (?)", digest[:16]).rowcount == 0

    def nearly_repeats(self, values: npt.NDArray[np.uint32]) -> bool:
        """Whether a kept document is as similar as the threshold says by its signature; if not,
        this one is kept.

        Compared are the first kept documents with an equal band, one a band, so that the time
        for a document does not grow with the corpus.
        """
        import numpy as np

        bands = band_hashes(values, self._rows)
        marks = ",".join("?" * len(bands))
        found = self._run(
            "SELECT signature FROM signatures WHERE document IN "  # noqa: S608 - question marks
            f"(SELECT document FROM bands WHERE band IN ({marks}))",
            *bands,
        )
        for (other,) in found:
            if np.mean(np.frombuffer(other, "<u4") == values) >= self._threshold:
                return True
        kept = self._run(
            "INSERT INTO signatures (signature) VALUES (?)", values.astype("<u4").tobytes()
        ).lastrowid
        for band in bands:
            self._run("INSERT OR IGNORE INTO bands VALUES (?, ?)", band, kept)
        return False

    def close(self) -> None:
        """Forget everything."""
        self._database.close()
        self._path.unlink(missing_ok=True)

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise OSError(f"{error} ({self._path})") from error
