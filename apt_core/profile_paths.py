"""Where the paths of a profile lead: said once, for every key that is one.

What is read is looked for beside the profile that says it, a parent's beside the parent, and then
in the working directory; what the command line says, in the working directory alone. What is
written goes below the working directory. ``~`` is a home directory everywhere. The resolved profile
holds absolute paths, so that it means the same wherever it is read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt_core.errors import Problem

Key = tuple[str, ...]

READ: tuple[Key, ...] = (("data", "train_path"), ("data", "val_path"))
WRITTEN: tuple[Key, ...] = (
    ("training", "checkpoint_dir"),
    ("monitoring", "tensorboard", "log_dir"),
)
PLUGINS: Key = ("plugins",)
FOUND_BESIDE = (*READ, PLUGINS)
"""Keys whose paths depend on where the profile lies that says them."""


def resolve_paths(data: dict[str, Any], folder_of: Callable[[Key], Path | None]) -> None:
    """Resolve the core's paths in the ``data`` of a profile; ``folder_of`` tells where the file
    lies that says a key.

    What is not there stays as it was written: to some loaders it is no path.
    """
    for section, key, text in _texts(data, READ):
        section[key[-1]] = found_path(text, folder_of(key))
    for section, key, text in _texts(data, WRITTEN):
        section[key[-1]] = os.path.expanduser(text)
        with suppress(OSError):  # the working directory is gone
            section[key[-1]] = os.path.abspath(section[key[-1]])


def user_path(path: str | Path) -> Path:
    """``path`` with its ``~``, which no shell expands within ``--output=~/runs``."""
    return Path(os.path.expanduser(path))


def found_path(text: str, folder: Path | None = None) -> str:
    """The absolute path of what is at ``text``: beside the profile in ``folder``, else in the
    working directory. What is nowhere is returned as it is, but for its ``~``."""
    path = os.path.expanduser(text)
    for base in (folder, Path()) if folder is not None else (Path(),):
        with suppress(OSError, ValueError, RuntimeError):
            there = base / path
            if os.path.exists(there):
                # Through links to the folder, but not the file's own: its suffix says what it is.
                return str(there.parent.resolve() / there.name)
    return path


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


def _texts(
    data: dict[str, Any], keys: tuple[Key, ...]
) -> Iterator[tuple[dict[str, Any], Key, str]]:
    """The keys that hold some text, each with the section around it."""
    for key in keys:
        section: Any = data
        for part in key[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        text = section.get(key[-1]) if isinstance(section, dict) else None
        if isinstance(text, str) and text:
            yield section, key, text
