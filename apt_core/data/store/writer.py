"""Writes the parts of a token store, shard by shard."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from apt_core.data.store import format as store_format
from apt_core.data.store.format import PartRow, ShardRow, file_name

WITHOUT_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


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

    def copy_to(self, path: Path, more: bytes = b"") -> str:
        """Write what it has so far, and ``more``, to another file; the sha256 of it."""
        self._file.flush()
        digest = self._digest.copy()
        digest.update(more)
        with ShardFile(path)._file as copy, Path(self._file.name).open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.write(more)
            copy.flush()
            os.fsync(copy.fileno())
        return digest.hexdigest()

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

    Memory is bounded by the largest document. ``at_border`` is the row of its whole shards.
    Raises OSError, after which :meth:`abandon` is all that may be called.
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
        self.at_border = self._row([])

    def add(
        self,
        ids: npt.NDArray[Any],
        learned: npt.NDArray[np.bool_] | None,
        num_bytes: int,
        digest: bytes,
    ) -> None:
        """Append a document: its ids, those to be learned (None for all), the bytes of its learned
        text and the digest of its content."""
        if self.ends_shard(len(ids)):
            self.end_shard()
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
            self.end_shard()
        return self._row(self._shards)

    def row_so_far(self) -> PartRow:
        """What was added so far, without its shards."""
        return self._row([])

    def _row(self, shards: list[ShardRow]) -> PartRow:
        return PartRow(
            tokens=self.num_tokens,
            documents=self.num_documents,
            learned=self.num_learned,
            bytes=self.num_bytes,
            tokens_sha256=self._tokens_digest.hexdigest(),
            documents_sha256=self._documents_digest.hexdigest(),
            shards=list(shards),
        )

    def ends_shard(self, tokens: int) -> bool:
        """Whether a document of so many tokens begins another shard."""
        limit = store_format.shard_tokens(len(self._shards))
        return bool(self._tokens) and self._tokens + tokens > limit

    def copy_into(self, folder: Path) -> PartRow:
        """Put all that was added so far into ``folder``, as a part of its own: whole shards as
        links, the one at hand as a copy."""
        shards = list(self._shards)
        for number, shard in enumerate(shards):
            link_shard(self._folder, folder, self._name, number, shard)
        if self._files:
            bits = np.packbits(self._bits, bitorder="little").tobytes()
            hashes = {
                suffix: file.copy_to(
                    folder / file_name(self._name, len(shards), suffix),
                    bits if suffix == "learned" else b"",
                )
                for suffix, file in self._files.items()
            }
            shards.append(self._shard_row(hashes))
        return self._row(shards)

    def _shard_row(self, hashes: dict[str, str]) -> ShardRow:
        marked = "learned" in self._files
        row = {"tokens": self._tokens, "documents": self._documents, "marked": marked}
        return ShardRow.model_validate({**row, "sha256": hashes})

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

    def end_shard(self) -> None:
        """End the shard at hand."""
        marked = "learned" in self._files
        if marked and len(self._bits):
            self._files["learned"].write(np.packbits(self._bits, bitorder="little").data)
        hashes = {suffix: file.close() for suffix, file in self._files.items()}
        self._shards.append(self._shard_row(hashes))
        self.at_border = self._row(self._shards)
        self._files = {}
        self._tokens = self._documents = 0
        self._bits = np.empty(0, np.bool_)


def link_shard(source: Path, target: Path, part: str, number: int, shard: ShardRow) -> None:
    """Put the files of a whole shard into another folder too, in place of those of their names; as
    copies where the file system has no links."""
    for suffix in shard.sha256:
        name = file_name(part, number, suffix)
        made = target / f"{name}.linked"
        made.unlink(missing_ok=True)
        try:
            os.link(source / name, made)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            shutil.copyfile(source / name, made)
        made.replace(target / name)
