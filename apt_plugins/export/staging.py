"""Puts an export in its place as a whole: it is written beside that, and renamed once it is
proven."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apt_core import AptError, ConfigError
from apt_core.files import flush
from apt_core.held_folders import held_folder, holding, left_over
from apt_plugins.export.certificate import CERTIFICATE

_KEY = "--output"

EXPORTS = "exports"
"""The folder in that of a run that holds what was exported of it."""

PROBE = ".mode"
STAGING, REPLACED = ".exporting", ".replaced"


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


def check_outside(target: Path, run: Path) -> None:
    """Raise ConfigError for a ``target`` among the files of the folder of ``run``, where only
    EXPORTS has room for exports."""
    run, place = run.resolve(), target.resolve()
    if place == run or (run in place.parents and run / EXPORTS not in place.parents):
        message = f"is inside the run's own folder, which holds exports in {EXPORTS}/ alone"
        hint = f"name {run / EXPORTS / target.name}, or a folder elsewhere"
        raise ConfigError(message, _KEY, str(target), hint)


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An empty folder beside ``target``, and a function that puts it there, in place of an earlier
    export where ``force`` says so. The folder is removed where that was not called; what a killed
    process left is removed at the next export.

    Raises AptError where it cannot be written, and the function ConfigError where something has
    come to be at ``target`` meanwhile.
    """
    target = target.absolute()
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        with held_folder(target.parent, f".{target.name}.*{STAGING}") as folder:
            yield folder, lambda: _publish(folder, target, force=force)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AptError(f"{target}: the export cannot be written: {reason}") from error
    finally:
        for path in missing:  # as long as they are empty
            with suppress(OSError):
                path.rmdir()


def _publish(staging: Path, target: Path, *, force: bool) -> None:
    # Files that were written by way of temporary ones would be their owner's alone.
    (staging / PROBE).touch()
    mode = (staging / PROBE).stat().st_mode & 0o777
    (staging / PROBE).unlink()
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        flush(path)
    flush(staging)
    check_target(target, force=force)
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)
        flush(target.parent)
        return
    replaced = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{REPLACED}")
    with holding(target):
        target.rename(replaced)
        try:
            staging.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        flush(target.parent)
        shutil.rmtree(replaced)


def _clear(target: Path) -> None:
    """Put back an earlier export that a killed process was about to replace, and delete one that it
    has replaced."""
    for path in left_over(target.parent, f".{target.name}.*{REPLACED}"):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
