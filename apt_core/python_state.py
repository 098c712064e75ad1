"""State of the process that is watched besides that of torch, and how to put states back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple


class State(NamedTuple):
    """One watched state. ``put`` sets a value that ``get`` returned; ``shows`` says whether
    messages show the values."""

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


PYTHON_STATES = (
    State("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    State("working directory", _folder, _set_folder),
)
"""The states that exist without torch."""


def put_back(states: Sequence[State], values: Sequence[Any]) -> list[str]:
    """Set each state that differs from its value in ``values``; return the changes as texts."""
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
    """The change in words; of tuples only the items that differ."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        parts = [(b, n) for b, n in zip(before, now, strict=True) if b != n]
        return ", ".join(_difference(b, n) for b, n in parts)
    return f"{before} to {now}"
