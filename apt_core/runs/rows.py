"""Files of rows, one JSON object a line: each written through at once, and read whatever has become
of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from apt_core.files import append_to_file, require_inside, was_replaced
from apt_core.json_files import MAX_LINE, json_rows, without_nan
from apt_core.log import get_logger

log = get_logger("apt.training")

MAX_STEP = 10**15
"""No run has this many steps: a row with a larger one is invalid."""


class RowFile:
    """Appends rows to the file at ``path``.

    A row is in the file when :meth:`append` returns, but for a disk that is full: then it waits
    in memory until there is room, and the run goes on. What was cut before, by a kill, stays a
    line of its own. ``first`` is called before the next row is written, until it succeeds; it may
    raise OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first: Callable[[], None] | None = None
        self._file: FileIO | None = None
        self._unwritten = b""

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row. A number that is not finite is written as a string, as JSON has none."""
        text = json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False, default=str)
        waiting = bool(self._unwritten)
        self._unwritten += text.encode("utf-8", errors="backslashreplace") + b"\n"
        try:
            self.settle()
            file = self._open()
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if not waiting:
                log.error("%s: rows wait for room on the disk: %s", self.path.name, error)

    def settle(self) -> None:
        """Call ``first`` until it has succeeded. Raises OSError."""
        if self.first is not None:
            self.first()
            self.first = None

    def _open(self) -> FileIO:
        if self._file is not None and was_replaced(self._file, self.path):
            self.close()
            log.warning("%s was moved or deleted: rows go to a new file from here", self.path.name)
        if self._file is None:
            self._file = append_to_file(self.path)
            if _is_cut(self.path):
                self._unwritten = b"\n" + self._unwritten
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_cut(path: Path) -> bool:
    """Whether the last line of the file at ``path`` is incomplete."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_rows(path: Path, notes: list[str], longest: int = MAX_LINE) -> Iterator[dict[str, Any]]:
    """The rows in the file at ``path`` whose ``step`` is a number of steps, as a stream.

    Never raises: what cannot be read, such as a last row that was cut off by a kill or a line of
    more than ``longest`` bytes, is left out, and ``notes`` say so when the end is reached.
    """
    name, unread, cut = path.name, 0, False
    try:
        require_inside(path.parent, path)
        for line, row in json_rows(path, longest):
            unread += cut
            cut = False
            if row is not None and is_step(row.get("step")):
                yield row
            elif row is None and not line.endswith(b"\n"):
                cut = True
            else:
                unread += 1
    except FileNotFoundError:
        notes.append(f"there is no {name}")
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    if cut:
        notes.append(f"the last row of {name} is cut off and left out")
    if unread:
        notes.append(f"{unread:,} lines of {name} cannot be read and are left out")


def is_step(value: object) -> bool:
    """Whether this value from a file can be a number of steps."""
    return type(value) is int and 0 <= value < MAX_STEP
