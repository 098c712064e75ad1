"""A lock on a folder, for as long as a process has a run in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from weakref import WeakSet

from apt_core.errors import ConfigError
from apt_core.json_files import read_json


class FolderLock:
    """Locks a folder until it is closed or the process ends, where the system has such locks.

    A forked child shares what its parent has open, the lock too, which would last as long as the
    child: it is closed there. A program that is started has none. Only a child that code in C
    forks, without Python, and that starts no program keeps it. Raises ConfigError, naming the
    holder, if another process holds it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._descriptor: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"another run is going on in this folder{_holder(path)}",
                key=key,
                where=str(path),
                hint="wait for it, or name another folder",
            ) from None
        except OSError:
            # A file system without locks.
            os.close(descriptor)
            return
        self._descriptor = descriptor
        _HELD.add(self)

    def close(self) -> None:
        """Unlock. Whoever else has the descriptor open does not keep the lock."""
        if self._descriptor is not None:
            import fcntl

            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        """Close the descriptor that a fork has copied; the parent keeps its lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


_HELD: WeakSet[FolderLock] = WeakSet()


def _forget_in_child() -> None:
    for lock in list(_HELD):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def process_row() -> dict[str, object]:
    """This process, as the manifest of its run names it."""
    return {"pid": os.getpid(), "host": platform.node()}


def _holder(path: Path) -> str:
    """A text on who holds the lock, as far as it is known."""
    pid = _locking_process(path)
    if pid is not None and (since := _start_of(pid)):
        return f": process {pid} of this machine, since {since}"
    if pid is not None:
        keepers = ", ".join(map(str, _processes_with(path)))
        kept = f" ({keepers})" if keepers else ""
        return (
            f", or its process {pid} has ended and left one behind that keeps the lock{kept}: "
            "end that one"
        )
    try:
        process = read_json(path / "manifest.json")["process"]
        return f": process {int(process['pid'])} of {process['host']!s}, since {process['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _locking_process(path: Path) -> int | None:
    """The process that holds the lock, if it runs on this machine and the system tells."""
    try:
        status = path.stat()
        device = status.st_dev
        place = f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and place in words and int(words[4]) > 0:
                return int(words[4])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _start_of(pid: int) -> str:
    """When a process of this machine was started, or an empty string if there is none."""
    try:
        # The command's name, in parentheses, may hold anything.
        ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
        seconds = boot + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _processes_with(path: Path) -> Iterator[int]:
    """The processes of this person that have ``path`` open."""
    real = os.path.realpath(path)
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            if any(os.path.realpath(each) == real for each in folder.iterdir()):
                yield int(folder.parent.name)
