"""Where a study is kept: a journal file in its folder, or a database."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from apt_core import ConfigError
from apt_core.error_text import one_line
from apt_core.errors import AptError
from apt_core.secrets import mask_urls

JOURNAL = "journal.log"
LOCK_SECONDS = 60.0
"""How long a process waits for another one that writes the journal."""


class StorageError(AptError):
    """The storage of a study cannot be used."""


class _FileLock(JournalFileSymlinkLock):
    """Locks the journal for one process. The system releases it when that process dies; for the
    link by which Optuna locks, which is taken where the system has no locks, the next one waits."""

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f"{journal.name}.flock")
        super().__init__(str(journal))
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        import fcntl

        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(descriptor)
                    raise StorageError(
                        f"{self._path}: another process has kept the study locked for "
                        f"{LOCK_SECONDS:.0f} seconds; find it with: fuser {self._path}"
                    ) from None
                time.sleep(0.005)
            except OSError:  # a file system without locks
                os.close(descriptor)
                return super().acquire()
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            super().release()
            return
        os.close(descriptor)


def _mend(journal: Path, lock: _FileLock) -> None:
    """Cut off the last line of a journal that a process died in, or that a full disk cut: whatever
    follows it could not be read."""
    if not journal.exists():
        return
    lock.acquire()
    try:
        with open(journal, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end and (file.seek(end - 1) or True) and file.read(1) != b"\n":
                end -= 1
            file.truncate(end)
    finally:
        lock.release()


def quiet() -> None:
    """Keep what Optuna says of its own course to its errors."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """The storage at a URL of a database, or the journal in the study's folder.

    Raises ConfigError for one that cannot be reached or is none.
    """
    quiet()
    if url is None:
        journal = folder / JOURNAL
        try:
            lock = _FileLock(journal)
            _mend(journal, lock)
            return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"it cannot be opened: {reason}", "--study", str(journal)) from None
        except Exception as error:
            hint = "move the file away to begin the study anew"
            message = f"it is no journal of a study: {one_line(error)}"
            raise ConfigError(message, "--study", str(journal), hint) from None
    shown = mask_urls(url)
    try:
        engine = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}
        return RDBStorage(url, engine_kwargs=engine)
    except ModuleNotFoundError as error:
        hint = f"pip install {error.name}"
        raise ConfigError(f"{error.name} is not installed", "--storage", shown, hint) from None
    except Exception as error:
        hint = "it is DIALECT+DRIVER://USER:PASSWORD@HOST:PORT/NAME, or sqlite:///PATH"
        message = f"the storage cannot be used: {_said(error, url)}"
        raise ConfigError(message, "--storage", shown, hint) from None


@contextmanager
def reaching(url: str | None) -> Iterator[None]:
    """Raise StorageError, without the URL's secrets, for a storage that fails in the context."""
    try:
        yield
    except _failures() as error:
        place = "the journal" if url is None else mask_urls(url)
        raise StorageError(f"the study's storage ({place}) fails: {_said(error, url)}") from error
    except OSError as error:
        if url is not None or not str(error.filename or "").endswith((JOURNAL, ".flock", ".lock")):
            raise
        raise StorageError(f"{error.filename}: {error.strerror}") from error


def _failures() -> tuple[type[Exception], ...]:
    """The errors of a storage."""
    found: list[type[Exception]] = [StorageInternalError]
    with suppress(ImportError):
        from sqlalchemy.exc import SQLAlchemyError

        found.append(SQLAlchemyError)
    return tuple(found)


def _said(error: BaseException, url: str | None) -> str:
    """The cause of an error on one line, without the URL's password."""
    cause: Any = error.__cause__ or error
    text = one_line(getattr(cause, "orig", None) or cause)
    if url:
        from urllib.parse import unquote, urlsplit

        with suppress(ValueError):
            password = urlsplit(url).password
            for secret in filter(None, (password, password and unquote(password))):
                text = text.replace(secret, "***")
    return mask_urls(text)
