"""Folders in which a process works for a while. Such a folder is locked as long as that process
lives, so that what a killed one has left is known, and deleted by the next.

On file systems without locks, and systems without ``fcntl``, nothing of others is ever deleted.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held_folder(parent: Path, name: str, *, private: bool = False) -> Iterator[Path]:
    """A new folder in ``parent``, which is called ``name`` with 8 letters and digits for its ``*``;
    it is deleted at the end, unless it was moved. Others of that name which no process holds are
    deleted before. Nobody else may look into a ``private`` one. Raises OSError."""
    remove_left_over(parent, name)
    folder, descriptor = _made(parent, name, 0o700 if private else 0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(descriptor)


@contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Hold a folder that is there; gives whether it could be locked, so that no other process holds
    it. Raises OSError for one that cannot be read."""
    descriptor = _opened(folder)
    try:
        yield _lock(descriptor)
    finally:
        _unlock(descriptor)


def remove_left_over(parent: Path, name: str) -> None:
    """Delete the folders of that ``name`` in ``parent``, of this user, which no process holds."""
    for path in left_over(parent, name):
        shutil.rmtree(path, ignore_errors=True)


def left_over(parent: Path, name: str) -> Iterator[Path]:
    """The folders of that ``name`` in ``parent``, of this user, which no process holds; each is
    held until the next is asked for."""
    before, _, after = name.partition("*")
    with suppress(OSError):
        for path in sorted(parent.iterdir()):
            part = path.name.removeprefix(before).removesuffix(after)
            if path.name != f"{before}{part}{after}" or len(part) != 8 or not part.isalnum():
                continue
            with suppress(OSError), holding(path) as free:
                if free and path.lstat().st_uid == os.getuid():
                    yield path


def _made(parent: Path, name: str, mode: int) -> tuple[Path, int]:
    while True:
        folder = parent / name.replace("*", uuid.uuid4().hex[:8])
        folder.mkdir(mode)
        descriptor = _opened(folder)
        # Between the two another process may have taken it for one that was left.
        _lock(descriptor)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return folder, descriptor
        os.close(descriptor)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(descriptor: int) -> bool:
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _unlock(descriptor: int) -> None:
    """Also where a forked process has the folder open."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
