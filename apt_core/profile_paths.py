"""Where the paths of a profile lead: said once, for every key that is one.

What is read is looked for beside the profile that says it, a parent's beside the parent, and then
in the working directory; what the command line says, in the working directory alone. So is what a
pattern (``texts/*.txt``) matches; a URL stays as it is. What is written goes below the working
directory. ``~`` is a home directory everywhere. The resolved profile holds absolute paths, so that
it means the same wherever it is read again.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt_core.errors import Problem
from apt_core.task_names import is_task_file

Key = tuple[str, ...]

SUFFIXES = (".yaml", ".yml")
LOCAL_FOLDER = Path("profiles")
INSTALLED_FOLDER = Path(__file__).resolve().parents[1] / "profiles"
"""Beside the package. On the import path another folder of this name may come first, such as
LOCAL_FOLDER."""

RUNS = Path("runs")
"""Where runs are that were given no folder: ``runs/PROFILE/TIME``."""

READ: tuple[Key, ...] = (
    ("data", "train_path"),
    ("data", "val_path"),
    ("data", "mixture", "train_path"),
    ("data", "mixture", "val_path"),
    ("data", "tokenizer", "path"),
    ("data", "tokenizer", "chat_template"),
)
"""Within a list of sections, such as the mixture, a key is that of each of them."""

WRITTEN: tuple[Key, ...] = (
    ("training", "checkpoint_dir"),
    ("monitoring", "tensorboard", "log_dir"),
)
PLUGINS: Key = ("plugins",)
TASKS: Key = ("evaluation", "tasks")
"""Some of which are files."""

FOUND_BESIDE = (*READ, PLUGINS, TASKS)
"""Keys whose paths depend on where the profile lies that says them."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


def list_profiles() -> list[str]:
    """The names that ``--profile`` takes without a path, sorted."""
    names: set[str] = set()
    for folder in (LOCAL_FOLDER, INSTALLED_FOLDER):
        if folder.is_dir():
            names.update(file.stem for file in folder.iterdir() if file.suffix in SUFFIXES)
    return sorted(names)


def resolve_paths(data: dict[str, Any], folder_of: Callable[[Key], Path | None]) -> None:
    """Resolve the core's paths in the ``data`` of a profile; ``folder_of`` tells where the file
    lies that says a key.

    What is not there stays as it was written: to some loaders it is no path.
    """
    for key in READ:
        for holder, at in paths_of(data, key):
            holder[at] = found_path(holder[at], folder_of(key))
    for holder, at in paths_of(data, TASKS):
        if is_task_file(holder[at]):
            holder[at] = found_path(holder[at], folder_of(TASKS))
    for key in WRITTEN:
        for holder, at in paths_of(data, key):
            holder[at] = os.path.expanduser(holder[at])
            with suppress(OSError):  # the working directory is gone
                holder[at] = os.path.abspath(holder[at])


def paths_of(data: dict[str, Any], key: Key) -> list[tuple[Any, Any]]:
    """The texts under ``key``, one or a list: for each the mapping or list that holds it, and where
    in that."""
    holders: list[Any] = [data]
    for part in key[:-1]:
        below = [holder.get(part) for holder in holders if isinstance(holder, dict)]
        holders = [
            each for value in below for each in (value if isinstance(value, list) else [value])
        ]
    found: list[tuple[Any, Any]] = []
    for holder in holders:
        value = holder.get(key[-1]) if isinstance(holder, dict) else None
        if isinstance(value, list):
            found += [(value, at) for at, text in enumerate(value) if isinstance(text, str)]
        elif isinstance(value, str):
            found.append((holder, key[-1]))
    return [(holder, at) for holder, at in found if holder[at]]


def user_path(path: str | Path) -> Path:
    """``path`` with its ``~``, which no shell expands within ``--output=~/runs``."""
    return Path(os.path.expanduser(path))


def found_path(text: str, folder: Path | None = None) -> str:
    """The absolute path of what is at ``text``, or of what it matches as a pattern: beside the
    profile in ``folder``, else in the working directory. What is nowhere, and a URL, is returned as
    it is, but for its ``~``."""
    path = os.path.expanduser(text)
    bases = (folder, Path()) if folder is not None else (Path(),)
    for base in bases:
        with suppress(OSError, ValueError, RuntimeError):
            there = base / path
            if os.path.exists(there):
                # Through links to the folder, but not the file's own: its suffix says what it is.
                return str(there.parent.resolve() / there.name)
    if is_pattern(path) and not is_url(path):
        for base in bases:
            with suppress(OSError, ValueError, RuntimeError, re.error):
                if matches(str(base / path)):
                    return os.path.join(os.path.abspath(base), path)
    return path


def is_url(path: str) -> bool:
    """Whether ``path`` is for fsspec, such as ``s3://bucket/a.txt``."""
    return _URL.match(path) is not None


def is_pattern(path: str) -> bool:
    """Whether ``path`` stands for the files that match it, if there is no file of this name."""
    # A question mark in a URL of HTTP begins its query.
    return glob.has_magic(path.replace("?", "") if path.startswith("http") else path)


def matches(pattern: str) -> bool:
    """Whether anything matches ``pattern``."""
    return next(glob.iglob(pattern, recursive=True), None) is not None


def unrecordable(named: Mapping[str, object]) -> list[Problem]:
    """A problem for each path, by what gives it, that is no UTF-8: file names may be any bytes,
    what is kept of a run is text."""
    problems = []
    for name, path in named.items():
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            hint = "rename it, or give a link to it"
            problems.append(Problem(f"{path} is no UTF-8, as records are", key=name, hint=hint))
    return problems
