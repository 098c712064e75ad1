"""What is watched in the process beside torch, and how a state is read, set, and told of."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple


class State(NamedTuple):
    """One thing that is watched. ``put`` sets what ``get`` has read before; a state that shows
    nothing has no words for its values."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]
    shows: bool = True


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _set_folder(path: str | None) -> None:
    if path is not None:
        with suppress(OSError):
            os.chdir(path)


OF_PYTHON = (
    State("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    State("working directory", _folder, _set_folder),
)
"""What there is without torch."""


def put_back(states: Sequence[State], values: Sequence[Any]) -> list[str]:
    """Give each of the ``states`` its value of before again; in words, which had another one."""
    found = []
    for state, value in zip(states, values, strict=True):
        now = state.get()
        if now == value:
            continue
        with suppress(RuntimeError):
            state.put(value)
        kept = "" if state.get() == value else " (it cannot be put back)"
        shown = f" from {_difference(value, now)}" if state.shows else ""
        found.append(f"{state.name}{shown}{kept}")
    return found


def _difference(before: Any, now: Any) -> str:
    """What is another one, in words."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        parts = [(b, n) for b, n in zip(before, now, strict=True) if b != n]
        return ", ".join(_difference(b, n) for b, n in parts)
    return f"{before} to {now}"
