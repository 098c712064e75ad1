"""Puts an export in its place as a whole: it is written beside that, and renamed once it is
proven."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apt_core import AptError, ConfigError
from apt_core.files import flush
from apt_plugins.export.certificate import CERTIFICATE

_KEY = "--output"

PROBE = ".mode"


def check_target(target: Path, *, force: bool) -> None:
    """Raise ConfigError where an export cannot be put at ``target``: something is there that
    ``force`` does not replace, or nothing can be written beside it."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError("is there, and is no folder", _KEY, str(target))
    try:
        entries = [*target.iterdir()] if target.exists() else []
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", _KEY, str(target)) from None
    if entries and not force:
        hint = "--force replaces an earlier export; or name another folder"
        raise ConfigError("is there, and is not empty", _KEY, str(target), hint)
    if entries and not (target / CERTIFICATE).is_file():
        message = f"is there without a {CERTIFICATE}: --force replaces nothing but exports"
        raise ConfigError(message, _KEY, str(target), "name another folder")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"{parent} is no folder", _KEY, str(target))
    if not os.access(parent, os.W_OK | os.X_OK):
        message = f"cannot be written: {parent} is not yours to write to"
        raise ConfigError(message, _KEY, str(target), "name another folder")


@contextmanager
def staged(target: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An empty folder beside ``target``, and a function that puts it there, in place of what is
    there. The folder is removed where that was not called; what a killed process left is removed at
    the next export. Raises AptError where it cannot be written."""
    target = target.absolute()
    _remove_left_over(target)
    staging = target.with_name(f".{target.name}.{os.getpid()}.exporting")

    def publish() -> None:
        # Files that were written by way of temporary ones would be their owner's alone.
        (staging / PROBE).touch()
        mode = (staging / PROBE).stat().st_mode & 0o777
        (staging / PROBE).unlink()
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            flush(path)
        flush(staging)
        if not target.exists() or not any(target.iterdir()):
            staging.rename(target)
            flush(target.parent)
            return
        replaced = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.replaced")
        target.rename(replaced)
        try:
            staging.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        flush(target.parent)
        shutil.rmtree(replaced)

    missing = [path for path in target.parents if not path.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging, publish
    except OSError as error:
        reason = error.strerror or str(error)
        raise AptError(f"{target}: the export cannot be written: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in missing:  # as long as they are empty
            with suppress(OSError):
                path.rmdir()


def _remove_left_over(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.exporting")
    with suppress(OSError):
        for path in target.parent.iterdir():
            found = pattern.fullmatch(path.name)
            if found and not _runs(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def _runs(number: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
