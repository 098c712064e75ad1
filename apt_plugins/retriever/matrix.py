"""Matrices, also in files, which are not mapped into memory: a mapped file that is cut off, or
whose disk is full, ends the process that touches it.

Shapes: N rows, D numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from apt_core.data.store.reader import OpenFiles
from apt_core.files import open_file

Floats = NDArray[np.float32]

IN_MEMORY = 1 << 29
"""The most bytes of a file that is held in memory; a larger one is read for each product."""

BLOCK_BYTES = 1 << 24
"""What is read of it at a time."""


class Matrix:
    """The matrix [N, D] ``values`` in memory."""

    def __init__(self, values: Floats) -> None:
        self._values = values
        self.shape: tuple[int, int] = (len(values), values.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from ``start`` to before ``stop``."""
        return self._values[start:stop]

    def blocks(self) -> Iterator[Floats]:
        """All rows, some at a time, in order."""
        each = max(1, BLOCK_BYTES // (4 * max(1, self.shape[1])))
        for start in range(0, len(self), each):
            yield self.rows(start, min(start + each, len(self)))

    def dot(self, vector: Floats) -> Floats:
        """The products [N] of the rows with ``vector`` [D]."""
        out, start = np.empty(len(self), np.float32), 0
        for block in self.blocks():
            np.matmul(block, vector, out=out[start : start + len(block)])
            start += len(block)
        return out


class StoredMatrix(Matrix):
    """The matrix in the file at ``path``, which a :class:`MatrixWriter` wrote. Raises OSError and
    ValueError for a file that is none; reading raises DamagedStoreError where it was cut off
    since."""

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{path} holds no matrix")
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            self._begin = file.tell()
            self.num_bytes = file.seek(0, 2) - self._begin
        if len(shape) != 2 or by_columns or dtype != np.float32:
            raise ValueError(f"{path} holds no matrix of float32")
        if self.num_bytes != 4 * shape[0] * shape[1]:
            raise ValueError(f"{path} is not as long as it says")
        self.shape = shape
        self._name, self._files = path.name, OpenFiles(path.parent)
        self._files.opened(self._name)  # whoever deletes the file leaves it to those who have it

    def rows(self, start: int, stop: int) -> Floats:
        out = np.empty((stop - start, self.shape[1]), np.float32)
        if out.size:
            offset = self._begin + 4 * start * self.shape[1]
            self._files.read_into(self._name, out.reshape(-1).view(np.uint8).data, offset)
        return out


def matrix_in(path: Path) -> Matrix:
    """The :class:`StoredMatrix` of a file, in memory if it is small. Raises what that does."""
    stored = StoredMatrix(path)
    small = stored.num_bytes <= IN_MEMORY
    return Matrix(stored.rows(0, len(stored))) if small else stored


class MatrixWriter:
    """Writes a matrix [N, D] into a file, whose form is NumPy's (.npy); a context, in which every
    row is put in its place. Raises OSError."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._width = shape[1]
        self._file = path.open("wb")
        header = {"shape": shape, "fortran_order": False, "descr": "<f4"}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._begin = self._file.tell()

    def put(self, places: Sequence[int], rows: Floats) -> None:
        """Write ``rows`` [n, D] at ``places``."""
        at = None
        for place, row in zip(places, rows, strict=True):
            if place != at:
                self._file.seek(self._begin + 4 * self._width * place)
            self._file.write(np.ascontiguousarray(row, "<f4").data)
            at = place + 1

    def __enter__(self) -> MatrixWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
