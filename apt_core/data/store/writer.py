"""Writes the parts of a token store, shard by shard."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from apt_core.data.store import format as store_format
from apt_core.data.store.format import PartRow, ShardRow, file_name


class ShardFile:
    """A file of a shard, with the hash of what is written to it."""

    def __init__(self, path: Path) -> None:
        # Closed by close(), or with the process that ends the build.
        self._file: IO[bytes] = path.open("xb", buffering=1 << 20)
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append bytes. Raises OSError."""
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        """Bring everything onto the disk; the sha256 of it. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file, whatever becomes of its content."""
        # Writing its buffer fails again on a full disk.
        with suppress(OSError):
            self._file.close()


class PartWriter:
    """Writes the documents of a part of a store, in order.

    Memory is bounded by the largest document. Raises OSError, after which :meth:`abandon` is all
    that may be called.
    """

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike) -> None:
        self._folder, self._name = folder, name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files: dict[str, ShardFile] = {}
        self._shards: list[ShardRow] = []
        self._tokens = self._documents = 0
        self._bits = np.empty(0, np.bool_)
        self.num_tokens = self.num_documents = self.num_learned = self.num_bytes = 0
        self._tokens_digest = hashlib.sha256(f"{self._dtype.itemsize}:".encode())
        self._documents_digest = hashlib.sha256()

    def add(
        self,
        ids: npt.NDArray[Any],
        learned: npt.NDArray[np.bool_] | None,
        num_bytes: int,
        digest: bytes,
    ) -> None:
        """Append a document: its ids, those to be learned (None for all), the bytes of its learned
        text and the digest of its content."""
        if self._tokens and self._tokens + len(ids) > store_format.SHARD_TOKENS:
            self._end_shard()
        if not self._files:
            self._files = {suffix: self._open(suffix) for suffix in ("ids", "ends")}
        data = np.ascontiguousarray(ids, self._dtype).data.cast("B")
        self._write_marks(learned, len(ids))
        self._files["ids"].write(data)
        # What is learned of the same ids depends on where documents end, and on the marks.
        marks = b"" if learned is None or learned.all() else np.packbits(learned).tobytes()
        for size in (len(ids), len(marks)):
            self._tokens_digest.update(size.to_bytes(8, "little"))
        self._tokens_digest.update(data)
        self._tokens_digest.update(marks)
        self._tokens += len(ids)
        self._documents += 1
        self._files["ends"].write(self._tokens.to_bytes(8, "little"))
        self._documents_digest.update(digest)
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.num_learned += len(ids) if learned is None else int(np.count_nonzero(learned))
        self.num_bytes += num_bytes

    def close(self) -> PartRow:
        """End the last shard; what the manifest says of the part."""
        if self._files:
            self._end_shard()
        return PartRow(
            tokens=self.num_tokens,
            documents=self.num_documents,
            learned=self.num_learned,
            bytes=self.num_bytes,
            tokens_sha256=self._tokens_digest.hexdigest(),
            documents_sha256=self._documents_digest.hexdigest(),
            shards=self._shards,
        )

    def abandon(self) -> None:
        """Close the files of the shard at hand."""
        for file in self._files.values():
            file.abandon()
        self._files = {}

    def _open(self, suffix: str) -> ShardFile:
        return ShardFile(self._folder / file_name(self._name, len(self._shards), suffix))

    def _write_marks(self, learned: npt.NDArray[np.bool_] | None, count: int) -> None:
        if "learned" not in self._files:
            if learned is None or learned.all():
                return
            # All before is learned.
            self._files["learned"] = self._open("learned")
            whole, rest = divmod(self._tokens, 8)
            while whole:
                step = min(whole, 1 << 20)
                self._files["learned"].write(b"\xff" * step)
                whole -= step
            self._bits = np.ones(rest, np.bool_)
        marks = np.ones(count, np.bool_) if learned is None else learned
        bits = np.concatenate([self._bits, marks])
        whole = len(bits) // 8 * 8
        if whole:
            self._files["learned"].write(np.packbits(bits[:whole], bitorder="little").data)
        self._bits = bits[whole:]

    def _end_shard(self) -> None:
        marked = "learned" in self._files
        if marked and len(self._bits):
            self._files["learned"].write(np.packbits(self._bits, bitorder="little").data)
        hashes = {suffix: file.close() for suffix, file in self._files.items()}
        row = {"tokens": self._tokens, "documents": self._documents, "marked": marked}
        self._shards.append(ShardRow.model_validate({**row, "sha256": hashes}))
        self._files = {}
        self._tokens = self._documents = 0
        self._bits = np.empty(0, np.bool_)
