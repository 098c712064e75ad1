"""Where the code of a plugin is: its file and line, which files are its own, and their hash."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from apt_core.files import read_file

MAX_SOURCE = 10_000_000
"""Bytes of a file of Python: to compile one takes a hundred times as much memory."""


def source_of(code: Any) -> tuple[str, int]:
    """File and first line of a function, through decorators, partials and bound methods; of a
    module, a class or an instance (its class) the file and 0.

    Returns ``("", 0)`` for what has no Python source.
    """
    if isinstance(code, ModuleType):
        file = getattr(code, "__file__", None)
        return file if isinstance(file, str) else "", 0
    if isinstance(code, functools.partial):
        return source_of(code.func)
    if inspect.isroutine(code):
        function = inspect.unwrap(getattr(code, "__func__", code))
        known = getattr(getattr(function, "__func__", function), "__code__", None)
        return (known.co_filename, known.co_firstlineno) if known else ("", 0)
    try:
        return inspect.getfile(code if inspect.isclass(code) else type(code)), 0
    except (TypeError, OSError):
        return "", 0


def source_sha256(code: Any) -> str:
    """The hash of the source of a plugin: of its file, and of those beside it in a package.

    Returns ``""`` for what has no source that can be read.
    """
    file = Path(source_of(code)[0])
    in_package = (file.parent / "__init__.py").is_file()
    digest = hashlib.sha256()
    try:
        for path in sorted(file.parent.glob("*.py")) if in_package else [file]:
            text = read_file(path, MAX_SOURCE)
            digest.update(f"{path.name if in_package else ''}:{len(text)}:".encode() + text)
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def is_code_of(filename: str, home: str) -> bool:
    """Whether ``filename`` is the file ``home`` of a plugin, or in its folder if the plugin is a
    package."""
    if not home:
        return False
    folder = os.path.dirname(home)
    in_package = bool(folder) and os.path.exists(os.path.join(folder, "__init__.py"))
    return filename == home or (in_package and filename.startswith(folder + os.sep))


def short_path(filename: str) -> str:
    """The path relative to the working directory when it lies below it."""
    path = Path(filename)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename
