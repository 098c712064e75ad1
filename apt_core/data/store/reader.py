"""Reads token stores: any window, document or mark, without holding what is not asked for.

What is read is read at its place (pread): it is in the system's cache of files, and not in the
memory of the process, unless a run asks for a small store to be held there.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.data.store.format import (
    PARTS,
    DamagedStoreError,
    PartName,
    PartRow,
    StoreManifest,
    check_files,
    cut_row,
    file_name,
    read_manifest,
)
from apt_core.data.store.parts import Ints, Stretches, learned_in, require_starts, windows_in

MAX_OPEN = 64
"""The most files that a part keeps open."""

SEARCHED = 512
"""Ends of documents that are read at a time when one is looked for."""

Ids = npt.NDArray[Any]
Offsets = npt.NDArray[np.uint64]


class _OpenFile:
    """The descriptor of a file, which is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self.descriptor = os.open(path, flags)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class OpenFiles:
    """Files of a folder, of which those last used stay open. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes of a file from ``offset`` on. Raises DamagedStoreError for
        a file that cannot be read, or ends before."""
        self.fill(self.opened(name), name, buffer, offset)

    def fill(self, file: _OpenFile, name: str, buffer: memoryview, offset: int) -> None:
        """:meth:`read_into`, of a file that :meth:`opened` gave."""
        descriptor = file.descriptor
        while len(buffer):
            try:
                count = os.preadv(descriptor, [buffer], offset)
            except OSError as error:
                raise DamagedStoreError(f"{self._folder / name}: {error.strerror}") from None
            if count == len(buffer):
                return
            if not count:
                raise DamagedStoreError(f"{self._folder / name} is shorter than it was")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self._open.clear()

    def opened(self, name: str) -> _OpenFile:
        """The open file. One that another thread drops from the open ones is closed when it is no
        longer used."""
        with self._lock:
            file = self._open.pop(name, None)
            if file is None:
                file = self._open_file(name)
                while len(self._open) >= MAX_OPEN:
                    self._open.popitem(last=False)
            self._open[name] = file
            return file

    def _open_file(self, name: str) -> _OpenFile:
        try:
            file = _OpenFile(self._folder / name)
        except OSError as error:
            raise DamagedStoreError(f"{self._folder / name}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file.descriptor).st_mode):
            raise DamagedStoreError(f"{self._folder / name} is not a file")
        return file


class ShardedArray:
    """The numbers of one kind in all shards of a part, as one array on disk."""

    def __init__(
        self, files: OpenFiles, names: Sequence[str], starts: npt.NDArray[np.int64], dtype: str
    ) -> None:
        self._files, self._names, self._starts = files, names, starts
        self.dtype = np.dtype(dtype).newbyteorder("<")

    def shard_of(self, index: int) -> int:
        """The shard in which an item is."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def read_into(self, out: npt.NDArray[Any], start: int) -> None:
        """Fill a contiguous 1-D array with the items from ``start`` on."""
        size, shard = self.dtype.itemsize, self.shard_of(start)
        data = out.view(np.uint8).data
        while len(data):
            count = min(len(data), (int(self._starts[shard + 1]) - start) * size)
            offset = (start - int(self._starts[shard])) * size
            if count:
                self._files.read_into(self._names[shard], data[:count], offset)
            data, start, shard = data[count:], start + count // size, shard + 1

    def read_rows(self, rows: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> None:
        """Fill each row of a contiguous 2-D array with the items from its start on."""
        length, size = rows.shape[1], self.dtype.itemsize
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        within = starts + length <= self._starts[shards + 1]
        offsets = ((starts - self._starts[shards]) * size).tolist()
        data, width = rows.reshape(-1).view(np.uint8).data, length * size
        files: dict[int, tuple[_OpenFile, int]] = {}
        for row, shard in enumerate(shards.tolist()):
            if not within[row]:
                self.read_into(rows[row], int(starts[row]))
                continue
            if shard not in files:
                file = self._files.opened(self._names[shard])
                files[shard] = file, file.descriptor
            file, descriptor = files[shard]
            buffer, offset = data[row * width : (row + 1) * width], offsets[row]
            try:
                whole = os.preadv(descriptor, (buffer,), offset) == width
            except OSError:
                whole = False
            if not whole:  # once more, to read the rest or to say what is wrong
                self._files.fill(file, self._names[shard], buffer, offset)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The items from ``start`` to before ``stop``."""
        out = np.empty(stop - start, self.dtype)
        self.read_into(out, start)
        return out


class StoredPart:
    """A part of a token store. Tokens and documents are counted from its beginning."""

    def __init__(
        self, folder: Path, name: str, manifest: StoreManifest, row: PartRow, owner: object = None
    ) -> None:
        self._owner = owner
        self.in_memory = False
        self.num_tokens, self.num_documents = row.tokens, row.documents
        self.num_learned, self.num_bytes = row.learned, row.bytes
        self.tokens_sha256, self.documents_sha256 = row.tokens_sha256, row.documents_sha256
        self.marked = any(shard.marked for shard in row.shards)
        self._marked = [shard.marked for shard in row.shards]
        self._files = OpenFiles(folder)
        self._first_token = np.cumsum([0, *(shard.tokens for shard in row.shards)], dtype=np.int64)
        documents = np.cumsum([0, *(shard.documents for shard in row.shards)], dtype=np.int64)
        self._first_document = documents

        def names(suffix: str) -> list[str]:
            return [file_name(name, number, suffix) for number in range(len(row.shards))]

        self._ids = ShardedArray(self._files, names("ids"), self._first_token, manifest.dtype)
        self._ends = ShardedArray(self._files, names("ends"), documents, "uint64")
        self._bits = names("learned")
        self._held: tuple[Ids, npt.NDArray[np.bool_] | None] | None = None
        self._lock = threading.Lock()
        self.dtype = self._ids.dtype

    def read(self, start: int, stop: int) -> Ids:
        """The ids from ``start`` to before ``stop``, fewer where the part ends before."""
        stop = max(start, min(stop, self.num_tokens))
        held = self._all()
        return self._ids.read(start, stop) if held is None else held[0][start:stop]

    def marks(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which tokens from ``start`` to before ``stop`` are learned, fewer where the part ends
        before."""
        stop = max(start, min(stop, self.num_tokens))
        held = self._all()
        if held is not None and held[1] is not None:
            return held[1][start:stop]
        return self._read_marks(start, stop)

    def _read_marks(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        out = np.ones(stop - start, np.bool_)
        shard = self._ids.shard_of(start)
        while start < stop:
            first, end = int(self._first_token[shard]), int(self._first_token[shard + 1])
            count = min(stop, end) - start
            if count and self._marked[shard]:
                low, high = (start - first) // 8, -(-(start - first + count) // 8)
                data = np.empty(high - low, np.uint8)
                self._files.read_into(self._bits[shard], data.data, low)
                bits = np.unpackbits(data, bitorder="little")
                skipped = start - first - low * 8
                out[len(out) - (stop - start) :][:count] = bits[skipped : skipped + count]
            start, shard = start + count, shard + 1
        return out

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> Ids:
        """The ``length`` ids from each of ``starts`` on, [n, length]; beyond the end of the part
        its last id is repeated. Raises ValueError for negative starts, or without any token."""
        starts = np.asarray(starts, dtype=np.int64)
        held = self._all()
        if held is not None:
            return windows_in(held[0], starts, length)
        if len(starts) and starts.min() >= 0 and starts.max() + length <= self.num_tokens:
            out = np.empty((len(starts), length), self.dtype)
            self._ids.read_rows(out, starts)
            return out
        return self._rows(starts, length, self.dtype, self._ids.read_into, self._last_id)

    def learned(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
        """Which of the ids of :meth:`windows` are learned, [n, length]; none beyond the end."""
        starts = np.asarray(starts, dtype=np.int64)
        held = self._all()
        if held is not None and held[1] is not None:
            return learned_in(held[1], starts, length)

        def fill(out: npt.NDArray[Any], start: int) -> None:
            out[:] = self._read_marks(start, start + len(out))

        return self._rows(starts, length, np.dtype(np.bool_), fill, lambda: False)

    def stretches(self, starts: Ints, lengths: Ints) -> Stretches:
        """See :meth:`TokenPart.stretches`."""
        held = self._all()
        if held is not None:
            return Stretches(*held, starts)
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype)
        learned = np.empty(len(ids), np.bool_) if self.marked else None
        begins = ends - lengths
        for start, begin, end in zip(starts.tolist(), begins.tolist(), ends.tolist(), strict=True):
            self._ids.read_into(ids[begin:end], start)
            if learned is not None:
                learned[begin:end] = self._read_marks(start, start + end - begin)
        return Stretches(ids, learned, begins)

    def span(self, document: int) -> tuple[int, int]:
        """Where a document begins, and where the next one does. Raises ValueError for none."""
        start, stop = self.spans(document, document + 1).tolist()
        return start, stop

    def spans(self, first: int, last: int) -> Offsets:
        """Where each document from ``first`` to before ``last`` begins, and where the last of them
        ends, [last - first + 1]. Raises ValueError beyond the part."""
        self._require(first, last, self.num_documents, "documents")
        out = np.empty(last - first + 1, np.uint64)
        if first == last:
            out[0] = self.num_tokens if first == self.num_documents else self.span(first)[0]
            return out
        out[1:] = self._ends.read(first, last)
        shards = np.searchsorted(self._first_document, np.arange(first, last), side="right") - 1
        out[1:] += self._first_token[shards].astype(np.uint64)
        begins = self._first_document[shards[0]] == first
        out[0] = 0 if begins else self._ends.read(first - 1, first)[0]
        out[0] += np.uint64(self._first_token[shards[0]])
        if np.any(out[1:] < out[:-1]) or int(out[-1]) > self.num_tokens:
            raise DamagedStoreError("a document of the store ends before it begins, or beyond it")
        return out

    def document_at(self, token: int) -> int:
        """The document of a token. Raises ValueError beyond the part."""
        self._require(token, token + 1, self.num_tokens, "tokens")
        shard = self._ids.shard_of(token)
        wanted = token - int(self._first_token[shard])
        low, high = int(self._first_document[shard]), int(self._first_document[shard + 1])
        # The first document that ends after the token.
        while high - low > SEARCHED:
            middle = (low + high) // 2
            if int(self._ends.read(middle, middle + 1)[0]) > wanted:
                high = middle + 1
            else:
                low = middle + 1
        return low + int(np.searchsorted(self._ends.read(low, high), wanted, side="right"))

    def close(self) -> None:
        """Close its files and free its memory; another call opens and takes them again."""
        self._files.close()
        self._held = None

    @property
    def held_bytes(self) -> int:
        """The memory that it takes in memory."""
        return self.num_tokens * (self.dtype.itemsize + self.marked)

    def _all(self) -> tuple[Ids, npt.NDArray[np.bool_] | None] | None:
        """All ids, and which are learned where it is marked, if it is held in memory."""
        if self._held is None and self.in_memory:
            with self._lock:  # threads that make batches ahead begin at the same time
                if self._held is None:
                    ids = self._ids.read(0, self.num_tokens)
                    learned = self._read_marks(0, self.num_tokens) if self.marked else None
                    for array in (ids, learned):
                        if array is not None:
                            array.flags.writeable = False
                    self._held = ids, learned
        return self._held

    def _last_id(self) -> int:
        return int(self._ids.read(self.num_tokens - 1, self.num_tokens)[0])

    def _rows(
        self,
        starts: npt.NDArray[np.int64],
        length: int,
        dtype: np.dtype[Any],
        fill: Callable[[npt.NDArray[Any], int], None],
        beyond: Callable[[], int],
    ) -> npt.NDArray[Any]:
        require_starts(starts, self.num_tokens)
        out = np.empty((len(starts), length), dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            inside = max(0, min(length, self.num_tokens - start))
            fill(row[:inside], min(start, self.num_tokens - 1))
            if inside < length:
                row[inside:] = beyond()
        return out

    def _require(self, start: int, stop: int, size: int, what: str) -> None:
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{start} to {stop} is not within the part's {size} {what}")


class TokenStore:
    """A token store on disk. It and its parts keep ``owner``, with which the folder may end."""

    def __init__(self, folder: Path, manifest: StoreManifest, owner: object = None) -> None:
        self.folder, self.manifest, self._owner = folder, manifest, owner
        self._parts = {
            name: StoredPart(folder, name, manifest, row, owner)
            for name, row in manifest.parts.items()
        }

    @property
    def begun_sha256(self) -> str:
        """A hash of what the documents say by which a run knows the store that may begin before it
        is whole."""
        begun = self.manifest.begun
        if begun is None:
            return self.sha256
        known = f"early {begun.train_sha256} {begun.documents_sha256}"
        return hashlib.sha256(known.encode()).hexdigest()

    @cached_property
    def held_out(self) -> StoredPart:
        """What of the part ``val`` was there when a run could begin with the first shards."""
        begun = self.manifest.begun
        if begun is None:
            return self._parts["val"]
        row = cut_row(self.manifest.parts["val"], begun)
        return StoredPart(self.folder, "val", self.manifest, row, self._owner)

    def hold_in_memory(self, limit: int) -> None:
        """Hold each part in memory from its first use on until :meth:`close`, if both take at most
        ``limit`` bytes: to read a row of a file costs several times what it costs to copy one."""
        held = sum(part.held_bytes for part in self._parts.values()) <= limit
        for part in self._parts.values():
            part.in_memory = held

    @classmethod
    def open(cls, folder: str | Path, owner: object = None) -> TokenStore:
        """The store in a folder, in time proportional to its shards. Raises DamagedStoreError,
        which says what is wrong, where it is not what its manifest says."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return cls(folder, manifest, owner)

    @property
    def sha256(self) -> str:
        """A hash of what the documents say and on which side of the split they are."""
        parts = [self.manifest.parts[name].documents_sha256 for name in PARTS]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def tokens_sha256(self) -> dict[str, str]:
        """The hash of the ids of each part."""
        return {name: self.manifest.parts[name].tokens_sha256 for name in PARTS}

    def part(self, name: PartName) -> StoredPart:
        """The part ``train`` or ``val``."""
        return self._parts[name]

    def close(self) -> None:
        """Close the files and free the memory."""
        for part in (*self._parts.values(), self.held_out):
            part.close()
