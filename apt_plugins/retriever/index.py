"""An index over a folder of text: its passages, and what is computed of them.

It lies in a folder with one generation for each state of the text, whose name is a hash of that
state. A new generation takes over what files that have not changed gave to the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from apt_core.cache import cache_dir
from apt_core.code_source import short_path
from apt_core.data.sources.digests import kept_sha256
from apt_core.data.sources.files import DataFile, find_files
from apt_core.data.sources.reading import Reading
from apt_core.data.sources.text_default import READERS, TextDataset, read_text
from apt_core.data.store.format import DamagedStoreError
from apt_core.data.store.lock import waiting_for
from apt_core.data.store.reader import OpenFiles
from apt_core.errors import ConfigError
from apt_core.files import read_file
from apt_core.json_files import parse_json
from apt_core.log import get_logger
from apt_plugins.retriever.chunks import chunks_of
from apt_plugins.retriever.embedders import Embedder
from apt_plugins.retriever.matrix import Matrix, MatrixWriter, StoredMatrix, matrix_in
from apt_plugins.retriever.parts import fault_of, made
from apt_plugins.retriever.settings import RetrieverSettings

log = get_logger("apt.retriever")

VERSION = 1
"""Counts the changes of what an index holds for the same text."""

LOCK = "lock"
TEXTS = "texts.bin"
VECTORS = "vectors.npy"

T = TypeVar("T")

_GENERATION = re.compile(r"v\d+-[0-9a-f]{24}")

KEY = "retriever.folder"
BATCH = 256
MAX_LIST = 1 << 28
TOLD_EVERY = 5.0
"""Seconds between messages of a long build."""


class Passages:
    """The passages in a folder of an index; their texts are read as they are asked for, which
    raises DamagedStoreError where the file was cut off since."""

    def __init__(self, folder: Path) -> None:
        listed = parse_json(read_file(folder / "files.json", MAX_LIST).decode("utf-8"))
        self.files: list[list[Any]] = listed["files"]
        self._bounds: NDArray[np.int64] = np.load(folder / "bounds.npy", allow_pickle=False)
        self._lines: NDArray[np.int64] = np.load(folder / "lines.npy", allow_pickle=False)
        self._owners: NDArray[np.int64] = np.load(folder / "owners.npy", allow_pickle=False)
        self._files = OpenFiles(folder)
        self._files.opened(TEXTS)  # whoever deletes the file leaves it to those who have it

    def __len__(self) -> int:
        return len(self._lines)

    def text(self, number: int) -> str:
        """The text of a passage."""
        start, end = map(int, self._bounds[number : number + 2])
        data = bytearray(end - start)
        self._files.read_into(TEXTS, memoryview(data), start)
        return data.decode()

    def texts(self) -> Iterator[str]:
        """The texts of all passages, in order."""
        return (self.text(number) for number in range(len(self)))

    def place(self, number: int) -> str:
        """The file of a passage, relative where it lies below the working directory, and its first
        line: ``path:line``."""
        path = short_path(self.files[self._owners[number]][0])
        return f"{path}:{self._lines[number]}"

    @cached_property
    def rows(self) -> dict[tuple[str, str], tuple[int, int]]:
        """The first passage and the number of passages of each file, by sha256 and suffix."""
        return {(sha, _suffix(path)): (first, count) for path, sha, first, count in self.files}


class Index:
    """The passages of ``settings.folder`` as it is now. Making it reads the files that are new or
    have changed; the log names those that cannot be read, and they are left out.

    Raises ConfigError where the folder has no text, OSError where the index cannot be written.
    """

    def __init__(self, settings: RetrieverSettings) -> None:
        assert settings.folder is not None
        self.settings = settings
        found = find_files(settings.folder, TextDataset.suffixes, KEY)
        if found.problems:
            raise ConfigError(found.problems)
        sums = kept_sha256(found.files, KEY)
        chunking = [settings.chunk_chars, settings.overlap_chars]
        paths = [file.path for file in found.files]
        state = json.dumps([VERSION, chunking, *zip(paths, sums, strict=True)])
        place = json.dumps([os.path.abspath(settings.folder), chunking])
        base = os.path.expanduser(settings.index) if settings.index else cache_dir() / "retrieval"
        self.root = Path(base) / _hash(place)
        self.path = self.root / f"v{VERSION}-{_hash(state)}"
        self.embedded = 0
        self.passages = self.kept(
            "passages", lambda to: self._write(to, found.files, sums), Passages
        )
        if not len(self.passages):
            raise ConfigError("no file in it holds text", KEY, str(settings.folder))

    def kept(self, name: str, build: Callable[[Path], None], read: Callable[[Path], T]) -> T:
        """What ``read`` makes of the folder ``name`` of this generation, into which ``build`` has
        written it. While another process builds, or deletes, this one waits. Raises OSError, and
        what both raise."""
        folder = self.path / name
        # Without the lock, which cannot be had where nothing can be written.
        with suppress(OSError, DamagedStoreError):
            if fault_of(folder) is None:
                return read(folder)
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock():
            return read(made(folder, build))

    def vectors(self, embedder: Embedder) -> Matrix:
        """The vectors [N, D] of all passages. Those that the generation before has are taken over,
        and ``embedded`` counts the others."""
        name = f"vectors-{embedder.identity}"
        return self.kept(
            name, lambda to: self._embed(to, name, embedder), lambda to: matrix_in(to / VECTORS)
        )

    def forget_others(self) -> None:
        """Delete the generations of other states of the text, and of other versions, if that is
        allowed here. Whoever has opened one keeps it."""
        others = [
            other
            for other in self.root.glob("v*-*")
            if _GENERATION.fullmatch(other.name)
            and other != self.path
            and (other / "passages").is_dir()
            and not other.is_symlink()
        ]
        if not others:
            return
        with suppress(OSError), self._lock():
            for other in others:
                shutil.rmtree(other, ignore_errors=True)

    def _lock(self) -> AbstractContextManager[Any]:
        return waiting_for(self.root / LOCK, f"the index of {self.settings.folder}")

    def _previous(self) -> Path | None:
        """The generation that was written last, if its passages are as they were."""
        others = []
        for path in self.root.glob(f"v{VERSION}-*"):
            if path != self.path:
                with suppress(OSError):
                    others.append((path.stat().st_mtime_ns, path))
        newest = max(others, default=(0, None))[1]
        usable = newest is not None and fault_of(newest / "passages") is None
        return newest if usable else None

    def _write(self, folder: Path, files: Sequence[DataFile], sums: Sequence[str]) -> None:
        previous = self._previous()
        before = None if previous is None else Passages(previous / "passages")
        told, listed, bounds = Told(), [], [0]
        lines: list[int] = []
        owners: list[int] = []
        with (folder / TEXTS).open("wb") as texts:
            for number, (file, sha) in enumerate(zip(files, sums, strict=True)):
                told.of("%s: file %d of %d is read", self.settings.folder, number + 1, len(files))
                first = len(lines)
                known = None if before is None else before.rows.get((sha, _suffix(file.path)))
                found = (
                    self._read(file) if known is None or before is None else _again(before, *known)
                )
                for line, text in found:
                    data = text.encode("utf-8", "replace")
                    texts.write(data)
                    bounds.append(bounds[-1] + len(data))
                    lines.append(line)
                    owners.append(number)
                listed.append([os.path.abspath(file.path), sha, first, len(lines) - first])
        (folder / "files.json").write_text(json.dumps({"files": listed}), encoding="utf-8")
        for name, values in (("bounds", bounds), ("lines", lines), ("owners", owners)):
            np.save(folder / f"{name}.npy", np.array(values, np.int64), allow_pickle=False)
        log.info("%s: %d passages of %d files", self.settings.folder, len(lines), len(files))

    def _read(self, file: DataFile) -> list[tuple[int, str]]:
        size, overlap = self.settings.chunk_chars, self.settings.overlap_chars
        found: list[tuple[int, str]] = []
        reading = Reading(file, KEY)
        try:
            for document in READERS.get(file.suffix, read_text)(reading):
                if reading.num_faults:
                    continue
                text = "\n".join(document.parts)
                found += chunks_of(text, _line_of(document.where), size, overlap)
            reading.raise_faults()
        except ConfigError as error:
            # Without hints: they name keys of the data that a model is trained on.
            told = [f"{problem.where}: {problem.message}" for problem in error.problems[:3]]
            log.warning("left out: %s", "; ".join(told))
            return []
        return found

    def _embed(self, folder: Path, name: str, embedder: Embedder) -> None:
        passages, told = self.passages, Told()
        size = embedder.embed(["a"]).shape[1]
        with MatrixWriter(folder / VECTORS, (len(passages), size)) as vectors:
            missing = self._taken_over(vectors, name)
            for start in range(0, len(missing), BATCH):
                told.of(
                    "%s: %d of %d passages are embedded", self.settings.folder, start, len(missing)
                )
                batch = missing[start : start + BATCH]
                found = embedder.embed([passages.text(number) for number in batch])
                if found.shape != (len(batch), size) or not np.isfinite(found).all():
                    raise ValueError(
                        f"{embedder.identity} gave vectors {found.shape} or no numbers"
                    )
                vectors.put(batch, found)
        self.embedded += len(missing)

    def _taken_over(self, vectors: MatrixWriter, name: str) -> list[int]:
        """Copy the vectors of files that the generation before has; the passages of the others."""
        before = self._previous()
        if before is None or fault_of(before / name) is not None:
            return list(range(len(self.passages)))
        old = StoredMatrix(before / name / VECTORS)
        rows = Passages(before / "passages").rows
        missing: list[int] = []
        for path, sha, first, count in self.passages.files:
            known = rows.get((sha, _suffix(path)))
            if known is None or known[1] != count:
                missing += range(first, first + count)
                continue
            for start in range(0, count, BATCH):
                places = range(first + start, first + min(start + BATCH, count))
                begin = known[0] + start
                vectors.put(places, old.rows(begin, begin + len(places)))
        return missing


def _again(before: Passages, first: int, count: int) -> Iterator[tuple[int, str]]:
    for number in range(first, first + count):
        yield int(before._lines[number]), before.text(number)


class Told:
    """Says how far a long build is: often enough to see that it goes on, and not in a short one."""

    def __init__(self) -> None:
        self._due = time.monotonic() + TOLD_EVERY

    def of(self, message: str, *values: object) -> None:
        """Log a message, if the time has come."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + TOLD_EVERY
            log.warning(message, *values)


def _line_of(where: str) -> int:
    """The line in the place of a document, ``path`` or ``path:line``."""
    last = where.rpartition(":")[2]
    return int(last) if last.isdecimal() and len(last) < 16 else 1


def _suffix(path: str) -> str:
    return os.path.basename(path).partition(".")[2].lower()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
