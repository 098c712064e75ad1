"""Sliding windows over a text that is longer than the model's context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """The model reads the tokens ``start`` to ``stop - 1`` (exclusive) and predicts those up to
    ``stop`` (exclusive); of these the ones from ``counted`` on count."""

    start: int
    stop: int
    counted: int


def windows_of(length: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """Windows in which each of the tokens ``first`` to ``length`` (exclusive) counts once.

    A window reads at most ``context`` tokens. The first one counts all that it predicts from
    ``first`` on, each later one its last ``stride``, so that these have ``context - stride`` tokens
    before them, or more. Raises ValueError for a ``stride`` that is not in 1..context, and for a
    ``first`` below 1: the first token is predicted from nothing.

    >>> [tuple(window) for window in windows_of(length=10, first=1, context=4, stride=2)]
    [(0, 5, 1), (2, 7, 5), (4, 9, 7), (5, 10, 9)]
    """
    if not 1 <= stride <= context:
        raise ValueError(f"a stride of {stride} for a context of {context}: give 1 to {context}")
    if first < 1:
        raise ValueError("nothing predicts the first token of a text")
    counted = first
    while counted < length:
        stop = min(length, max(counted + stride, context + 1))
        yield Window(max(0, stop - 1 - context), stop, counted)
        counted = stop
