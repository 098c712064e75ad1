"""Packings that keep documents apart: rows made of pieces of documents, as an index on disk.

A piece predicts up to T tokens of one document. The token before them is read too, so that
consecutive pieces predict each token of a document but its first exactly once. Pieces in which
nothing is to be learned are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from apt_core.data.packing.rows import IGNORED, Extract, Ints, Rows
from apt_core.data.store.format import DamagedStoreError
from apt_core.data.store.parts import TokenPart
from apt_core.data.store.reader import OpenFiles
from apt_core.files import write_atomically
from apt_core.json_files import read_json
from apt_core.log import get_logger

log = get_logger("apt.data")

FILES = ("starts", "lengths", "row_ends", "targets")
DTYPES = ("<u8", "<u4", "<u8", "<u4")
"""The arrays of an index on disk."""

HASHES = "sha256.json"
"""Their hashes."""

BLOCK = 1 << 16
"""The documents that are packed at a time, so that memory stays bounded."""

IN_MEMORY = 8 * 2**20
"""The most bytes of an index that is held in memory; of a larger one what is asked for is read."""


Packed = tuple[Ints, Ints, Ints, Ints]
"""Starts, lengths, row ends, and targets by piece."""


class Column:
    """An array of an index on disk, of which what is asked for is read. It is not mapped into
    memory: a mapped file that is cut off ends the process that reads it. Raises OSError and
    ValueError for what is no such file; reading it raises DamagedStoreError."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.name, self.num_bytes = name, (folder / name).stat().st_size
        self._dtype, self._files = np.dtype(dtype), OpenFiles(folder)
        self._length, rest = divmod(self.num_bytes, self._dtype.itemsize)
        if rest:
            raise ValueError(f"{folder / name} ends within a number")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: Ints | slice) -> Ints:
        """The items at these places, none of them negative."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        out = np.empty(len(indices), self._dtype)
        if not len(out):
            return out
        data, size = out.view(np.uint8).data, self._dtype.itemsize
        file = self._files.opened(self.name)
        # Most stand beside each other: the pieces of a row.
        starts = np.concatenate([[0], np.flatnonzero(np.diff(indices) != 1) + 1])
        places = (indices[starts] * size).tolist()
        borders = [*(starts * size).tolist(), len(data)]
        for (first, last), place in zip(pairwise(borders), places, strict=True):
            self._files.fill(file, self.name, data[first:last], place)
        return out

    def sum(self, dtype: Any) -> Any:
        """The sum of all items."""
        return sum((block.sum(dtype=dtype) for block in self._blocks()), start=dtype(0))

    def sha256(self) -> str:
        """The hash of its bytes."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block.data)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[Ints]:
        for start in range(0, len(self), BLOCK):
            yield self[start : start + BLOCK]


@dataclass(frozen=True)
class PieceIndex:
    """The rows of a packing: row i has the pieces ``row_ends[i - 1]`` to ``row_ends[i]``. A piece
    reads ``lengths`` tokens from ``starts`` on and predicts the one after each; ``targets`` counts
    by row those to be learned. Of a :class:`Column` on disk that was cut off or removed meanwhile,
    reading raises DamagedStoreError."""

    starts: Ints | Column
    lengths: Ints | Column
    row_ends: Ints | Column
    targets: Ints | Column

    @classmethod
    def of(cls, blocks: Iterable[Packed]) -> PieceIndex:
        """The index of these blocks, in memory."""
        columns = [list(column) for column in zip(*_columns(blocks), strict=True)]
        return cls(
            *(
                np.concatenate(arrays) if arrays else np.empty(0, dtype)
                for arrays, dtype in zip(columns or [[]] * len(DTYPES), DTYPES, strict=True)
            )
        )

    @classmethod
    def kept_in(cls, folder: Path, make: Callable[[], Iterable[Packed]]) -> PieceIndex:
        """The index in ``folder``, made by ``make`` where there is none, or a damaged one. A small
        one is in memory.

        It is written under another name first, so that a reader sees a whole index or none; where
        it cannot be kept it is in memory.
        """
        if (found := cls._read(folder)) is not None:
            return found
        try:
            _write(folder, make())
        except OSError as error:
            log.warning("the packing is not kept in %s: %s", folder, error)
            return cls.of(make())
        found = cls._read(folder)
        return cls.of(make()) if found is None else found

    @classmethod
    def _read(cls, folder: Path) -> PieceIndex | None:
        if not folder.exists():
            return None
        try:
            hashes = read_json(folder / HASHES)
            columns = [Column(folder, n, t) for n, t in zip(FILES, DTYPES, strict=True)]
            right = hashes == {column.name: column.sha256() for column in columns}
        except (OSError, ValueError, DamagedStoreError):
            columns, right = [], False
        if right:
            in_memory = sum(column.num_bytes for column in columns) <= IN_MEMORY
            return cls(*(column[:] if in_memory else column for column in columns))
        log.warning("the packing in %s is damaged and is made anew", folder)
        return None

    def __len__(self) -> int:
        return len(self.row_ends)

    def pieces(self, row: int) -> tuple[Ints, Ints]:
        """The starts and lengths of the pieces of a row, int64."""
        starts, lengths, _ = self.pieces_of(np.array([row]))
        return starts, lengths

    def pieces_of(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """The starts and lengths of the pieces of ``rows`` [n], one row after the other, and the
        number of pieces of each row [n]; int64."""
        # Beside each other, so that both are read at once.
        both = np.stack([np.maximum(rows - 1, 0), rows], axis=1).ravel()
        before, last = self.row_ends[both].astype(np.int64).reshape(-1, 2).T
        counts = last - np.where(rows > 0, before, 0)
        pieces = np.repeat(last - np.cumsum(counts), counts)
        pieces += np.arange(len(pieces))
        return self.starts[pieces].astype(np.int64), self.lengths[pieces].astype(np.int64), counts


@dataclass(frozen=True)
class PieceWindows:
    """Windows of ``index`` over ``part``; ``packed`` says that rows have more than one piece."""

    part: TokenPart
    seq_len: int
    index: PieceIndex
    packed: bool
    pad: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_tokens(self) -> int:
        return int(self.index.lengths.sum(dtype=np.int64))

    def rows(self, indices: Ints) -> Rows:
        # All positions at once: a batch may have as many pieces as tokens.
        indices = np.asarray(indices, dtype=np.int64)
        starts, lengths, counts = self.index.pieces_of(indices)
        taken = self.part.stretches(starts, lengths + 1)
        ends = np.cumsum(lengths)
        num_tokens = int(ends[-1]) if len(ends) else 0
        source = np.repeat(taken.begins - (ends - lengths), lengths)
        source += np.arange(num_tokens)
        input_ids = taken.ids[source].astype(np.int64)
        source += 1
        targets = taken.ids[source].astype(np.int64)
        if taken.learned is not None:
            targets[~taken.learned[source]] = IGNORED
        last = np.cumsum(counts)
        numbers = np.arange(len(lengths)) - np.repeat(last - counts, counts)
        document_ids = np.repeat(numbers, lengths)

        shape = (len(indices), self.seq_len)
        lengths_before = np.concatenate([[0], ends])
        used = lengths_before[last] - lengths_before[last - counts]
        filled = np.arange(self.seq_len) < used[:, None]

        def in_rows(values: Ints, padding: int) -> Ints:
            if len(values) == filled.size:
                return values.reshape(shape)
            found = np.full(shape, padding, dtype=np.int64)
            found[filled] = values
            return found

        return Rows(
            in_rows(input_ids, self.pad),
            in_rows(targets, IGNORED),
            self.num_targets(indices),
            num_tokens,
            in_rows(document_ids, -1),
            self.packed,
        )

    def num_targets(self, indices: Ints) -> int:
        return int(self.index.targets[np.asarray(indices, dtype=np.int64)].sum(dtype=np.int64))

    def extracts(self, index: int) -> list[Extract]:
        starts, lengths = self.index.pieces(index)
        found = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            document = self.part.document_at(start)
            begin = int(self.part.spans(document, document + 1)[0])
            found.append(Extract(document, start - begin, length))
        return found


def pack_documents(part: TokenPart, seq_len: int) -> Iterator[Packed]:
    """Rows of whole documents, each put where it leaves the least room (best fit, the longest
    first); a longer document fills rows of its own, and its rest joins others."""
    for starts, lengths, targets in _blocks(part, seq_len, cut=False):
        yield _best_fit(starts, lengths, targets, seq_len)


def pad_documents(part: TokenPart, seq_len: int, *, truncation: bool) -> Iterator[Packed]:
    """One piece a row. Of a document that is longer only the beginning is kept with
    ``truncation``; otherwise its rest fills rows of its own."""
    for starts, lengths, targets in _blocks(part, seq_len, cut=truncation):
        yield starts, lengths, np.arange(1, len(starts) + 1), targets


def _blocks(part: TokenPart, seq_len: int, *, cut: bool) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Starts, lengths and numbers of targets of the pieces of some documents at a time."""
    for first in range(0, part.num_documents, BLOCK):
        spans = part.spans(first, min(first + BLOCK, part.num_documents)).astype(np.int64)
        begins, predicted = spans[:-1], np.maximum(np.diff(spans) - 1, 0)
        counts = -(-predicted // seq_len)
        if cut:
            counts = np.minimum(counts, 1)
        owner = np.repeat(np.arange(len(begins)), counts)
        offset = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
        starts = begins[owner] + offset
        lengths = np.minimum(predicted[owner] - offset, seq_len)
        targets = lengths
        if part.marked:
            targets = np.array(
                [
                    int(np.count_nonzero(part.marks(start + 1, start + length + 1)))
                    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
                ],
                dtype=np.int64,
            )
        kept = targets > 0
        yield starts[kept], lengths[kept], targets[kept]


def _best_fit(starts: Ints, lengths: Ints, targets: Ints, seq_len: int) -> Packed:
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    open_rooms = 0  # bit r is set where a row with room for r exists
    for piece in order.tolist():
        length = int(lengths[piece])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            candidates = by_room[room]
            row = candidates.pop()
            if not candidates:
                open_rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = seq_len, len(rows)
            rows.append([piece])
        if left := room - length:
            if not by_room.setdefault(left, []):
                open_rooms |= 1 << left
            by_room[left].append(row)
    flat = np.array([piece for row in rows for piece in sorted(row)], dtype=np.int64)
    return starts[flat], lengths[flat], np.cumsum([len(row) for row in rows]), targets[flat]


def _columns(blocks: Iterable[Packed]) -> Iterator[tuple[Ints, ...]]:
    """The four arrays of an index, block by block."""
    pieces = 0
    for starts, lengths, row_ends, targets in blocks:
        if not len(row_ends):
            continue
        first = np.concatenate([[0], row_ends[:-1]]).astype(np.int64)
        columns = starts, lengths, row_ends + pieces, np.add.reduceat(targets, first)
        yield tuple(c.astype(dtype) for c, dtype in zip(columns, DTYPES, strict=True))
        pieces += len(starts)


def _write(folder: Path, blocks: Iterable[Packed]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        hashes = {name: hashlib.sha256() for name in FILES}
        with ExitStack() as stack:
            files = [stack.enter_context((making / name).open("wb")) for name in FILES]
            for columns in _columns(blocks):
                for name, file, column in zip(FILES, files, columns, strict=True):
                    hashes[name].update(column.data)
                    file.write(column.data)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        found = {name: digest.hexdigest() for name, digest in hashes.items()}
        write_atomically(making / HASHES, json.dumps(found))
        if folder.exists():  # a damaged one
            folder.rename(making / "old")
        with suppress(OSError):  # another process was faster
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(folder / "old", ignore_errors=True)
