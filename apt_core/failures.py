"""From an exception to what is kept and shown of it: one line, and a place in the plugin's code."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from apt_core.files import read_file
from apt_core.secrets import redact

MAX_TRACEBACK = 20_000
"""Characters of a traceback that are kept: a message may be of any length."""

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


def one_line(error: BaseException) -> str:
    """``ValueError: the message``, its first line, at most 300 characters.

    An exception whose ``__str__`` fails is named by its type alone.
    """
    first = shown(error)
    name = type(error).__name__
    return f"{name}: {first}"[:300] if first else name


def shown(value: object) -> str:
    """The first line of :func:`text_of` with something in it."""
    return next((line.strip() for line in text_of(value).splitlines() if line.strip()), "")


def text_of(value: object) -> str:
    """``str(value)``, whatever the object, as text that a file takes."""
    try:
        return _writable(str(value))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "(its message cannot be printed)"


def short_path(filename: str) -> str:
    """The path relative to the working directory when it lies below it."""
    path = Path(filename)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename


def is_code_of(filename: str, home: str) -> bool:
    """Is ``filename`` the file ``home`` of a plugin, or in the folder of one that is a package?"""
    if not home:
        return False
    folder = os.path.dirname(home)
    in_package = bool(folder) and os.path.exists(os.path.join(folder, "__init__.py"))
    return filename == home or (in_package and filename.startswith(folder + os.sep))


def where_raised(error: BaseException, home: str, line: int = 0) -> str:
    """``file:line`` of the deepest frame in the plugin whose code lives in the file ``home``.

    For a plugin that is a package that is any file of its folder; without such a frame, ``home``
    and ``line``, or for an unknown home the deepest frame of all.
    """
    frames = [(frame.f_code.co_filename, number) for frame, number in frames_of(error)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0))
    own_frames = [frame for frame in frames if is_code_of(frame[0], home)]
    if own_frames:
        home, line = own_frames[-1]
    elif not home and frames and not frames[-1][0].startswith("<"):
        home, line = frames[-1]
    return f"{short_path(home)}:{line}" if line else short_path(home) if home else ""


def frames_of(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that ``error`` has passed, the deepest last, with the line in each."""
    return traceback.walk_tb(_own(error, "__traceback__"))


def cause_of(error: BaseException) -> BaseException | None:
    """What ``error`` was raised from."""
    cause: BaseException | None = _own(error, "__cause__")
    return cause


def _own(error: BaseException, name: str) -> Any:
    """An attribute as Python keeps it: the class of an error may answer to none."""
    return vars(BaseException)[name].__get__(error)


def formatted(error: BaseException) -> str:
    """The traceback as text. The exception itself is not kept: it would keep tensors alive."""
    try:
        lines = [*traceback.TracebackException.from_exception(error, compact=True).format()]
    except Exception:  # a class of a plugin, whose attributes are what it makes of them
        lines = [*traceback.StackSummary.extract(frames_of(error)).format(), f"{one_line(error)}\n"]
    text = _writable("".join(lines))
    return text if len(text) <= MAX_TRACEBACK else f"{text[:MAX_TRACEBACK]}…\n"


def _writable(text: str) -> str:
    """``text`` without secrets, and with lone surrogates, which no file takes, as escapes."""
    return redact(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
