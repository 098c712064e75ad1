"""From an exception to what is kept and shown of it: one line, and a place in the plugin's code."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def source_of(function: Callable[..., Any]) -> tuple[str, int]:
    """File and first line of a function, through decorators, partials and bound methods.

    Returns ``("", 0)`` for a callable that has no Python source.
    """
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None) or getattr(
        getattr(function, "func", None), "__code__", None
    )
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


def one_line(error: BaseException) -> str:
    """``ValueError: the message``, its first line, at most 300 characters.

    An exception whose ``__str__`` fails is named by its type alone.
    """
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be printed)"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    name = type(error).__name__
    return f"{name}: {first}"[:300] if first else name


def short_path(filename: str) -> str:
    """The path relative to the working directory when it lies below it."""
    path = Path(filename)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename


def where_raised(error: BaseException, home: str) -> str:
    """``file:line`` of the deepest frame in the plugin whose hook lives in the file ``home``.

    For a plugin that is a package that is any file of its folder; without such a frame, the
    deepest frame of all.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short_path(error.filename)}:{error.lineno or 0}"
    frames = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if not frames:
        return short_path(home) if home else ""
    folder = os.path.dirname(home)
    in_package = bool(folder) and os.path.exists(os.path.join(folder, "__init__.py"))

    def own(filename: str) -> bool:
        return filename == home or (in_package and filename.startswith(folder + os.sep))

    filename, line = next((frame for frame in reversed(frames) if own(frame[0])), frames[-1])
    return f"{short_path(filename)}:{line}"


def formatted(error: BaseException) -> str:
    """The traceback as text. The exception itself is not kept: it would keep tensors alive."""
    return "".join(traceback.TracebackException.from_exception(error, compact=True).format())
