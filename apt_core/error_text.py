"""From an exception to what is kept and shown of it: one line, and a place in the plugin's code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

from apt_core.code_source import is_code_of, short_path
from apt_core.secrets import redact

MAX_TRACEBACK = 20_000
"""Characters of a traceback that are kept: a message may be of any length."""


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
