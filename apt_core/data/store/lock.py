"""Locks by which one process at a time builds a store."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apt_core.log import get_logger

log = get_logger("apt.data")

RETRY_SECONDS = 0.05
FIRST_SECONDS = 0.2
LOG_SECONDS = 10.0

StopCheck = Callable[[], None]
"""Called often while something is made or waited for; it raises what is to end that."""


def never_stop() -> None:
    """The check of who cannot be asked to stop."""


WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FileLock:
    """A lock on a file, which exists for as long as it is held; it ends with its process at the
    latest. ``works`` is false where the file system has no locks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self.works = True

    def acquire(self) -> bool:
        """Take the lock, if nobody has it; whether it is held now. Raises OSError where the file
        cannot be made."""
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            descriptor = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in WITHOUT_LOCKS:
                    self.works = False
                    self._descriptor = descriptor
                    return True
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            if self._is_current(descriptor):
                break
            # Whoever held it has deleted the file.
            os.close(descriptor)
        self._descriptor = descriptor
        os.truncate(descriptor, 0)
        with suppress(OSError):
            os.write(descriptor, str(os.getpid()).encode())
        return True

    def release(self) -> None:
        """Delete the file and end the lock, also where a forked process has the file open."""
        import fcntl

        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def holder(self) -> str:
        """The process that holds the lock, as far as it is known."""
        with suppress(OSError, ValueError):
            return f"process {int(self._path.read_bytes()[:20])}"
        return "another process"

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of ``path`` now. Who asks at the same time is not taken for
    one that holds it."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


@contextmanager
def waiting_for(path: Path, what: str, check_stop: StopCheck = never_stop) -> Iterator[FileLock]:
    """Hold the lock of ``path`` in the context. While another process has it, this one waits for
    what it makes, ``what``, and says so. Raises OSError, and what ``check_stop`` raises, which is
    called while this waits."""
    lock = FileLock(path)
    since = said = time.monotonic()
    waited = False
    while not lock.acquire():
        check_stop()
        now = time.monotonic()
        if now - said >= (LOG_SECONDS if waited else FIRST_SECONDS):
            log.info("waiting for %s, which %s makes (%.0f s)", what, lock.holder(), now - since)
            waited, said = True, now
        time.sleep(RETRY_SECONDS)
    try:
        yield lock
    finally:
        lock.release()
