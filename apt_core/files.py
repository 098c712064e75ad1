"""Files as bytes, where their names come from outside: what is no file is never waited for, and
nothing is read without end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

PIECE = 2**20
"""Bytes that are read at a time."""


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a file.

    Raises OSError, whose ``strerror`` says why: for what is no file, without waiting for it (a pipe
    may never be written to, a device may never end), and for one of more than ``limit`` bytes.
    """
    with open_file(path) as file:
        data = file.read() if limit is None else read_at_most(file, limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit / 1e6:g} MB", str(path))
    return data


def read_at_most(file: IO[bytes], size: int) -> bytes:
    """What ``file`` has, up to ``size`` bytes. Its ``read(size)`` would first take memory for as
    many, however few there are."""
    pieces = []
    while piece := file.read(min(size, PIECE)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def read_lines(path: str | Path, longest: int) -> Iterator[bytes]:
    """The lines of a file, each with its line feed; of one of more than ``longest`` bytes the
    beginning without it. Raises OSError as :func:`read_file` does."""
    with open_file(path) as file:
        while line := file.readline(longest):
            yield line
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(longest)


def open_file(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes. Raises OSError for what is none."""
    # Looked at before it is opened, which is an act upon some devices.
    _raise_unless_file(os.stat(path), path)
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    _close_unless_file(file, path)
    return file


def append_to_file(path: str | Path) -> FileIO:
    """Open a file for appending, unbuffered; it is made where it is missing.

    Raises OSError for what is no file, and for a link: what is written in a folder stays there.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = FileIO(os.open(path, flags, 0o666), "a")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a link, which is not followed", str(path)) from None
        if error.errno == errno.ENXIO:  # a pipe that nobody reads
            _raise_unless_file(os.stat(path), path)
        raise
    _close_unless_file(file, path)
    return file


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, last through a crash of the machine.
    Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_inside(folder: Path, path: Path) -> None:
    """Raise OSError where ``path``, or a link on its way, leads out of ``folder``, and for what can
    be no path: what somebody else has made of a folder does not decide which files are read."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "it has a null byte, which no name of a file has", str(path))
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        if os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), "")):
            raise OSError(errno.ELOOP, "it is a link that leads out of its folder", str(path))
        raise OSError(errno.EACCES, "it leads out of its folder", str(path))


def was_replaced(file: IO[Any], path: str | Path) -> bool:
    """Whether ``path`` is no longer the open ``file``, because it was deleted or rotated."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _close_unless_file(file: IO[Any] | FileIO, path: str | Path) -> None:
    try:
        _raise_unless_file(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise


def _raise_unless_file(status: os.stat_result, path: str | Path) -> None:
    for is_one, what, number in _NO_FILES:
        if is_one(status.st_mode):
            raise OSError(number, f"it is a {what}, not a file", str(path))


_NO_FILES = (
    (stat.S_ISDIR, "folder", errno.EISDIR),
    (stat.S_ISFIFO, "pipe", errno.EINVAL),
    (stat.S_ISSOCK, "socket", errno.EINVAL),
    (stat.S_ISCHR, "device", errno.EINVAL),
    (stat.S_ISBLK, "device", errno.EINVAL),
)
