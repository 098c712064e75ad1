"""Cuts text into passages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


def chunks_of(text: str, line: int, size: int, overlap: int) -> Iterator[tuple[int, str]]:
    """Passages of ``text``, whose first line has the number ``line``: each with the number of its
    first line, of at most ``size`` characters.

    A passage ends with a line, after half of the ``size`` with a paragraph. The lines at its end
    that have at most ``overlap`` characters together begin the next one, unless a paragraph ended.
    A line that is longer than a passage is cut at spaces. Passages without a word are left out.
    """
    held: deque[tuple[int, str]] = deque()
    length = new = 0

    def passage() -> Iterator[tuple[int, str]]:
        if new and any(part.strip() for _, part in held):
            yield held[0][0], "".join(part for _, part in held).strip("\n")

    for number, part in _parts(text, line, size):
        if held and length + len(part) > size:
            yield from passage()
            new = 0
            while held and (length > overlap or length + len(part) > size):
                length -= len(held.popleft()[1])
        if part.strip() or held:
            held.append((number, part))
            length += len(part)
            new += bool(part.strip())
        if not part.strip() and 2 * length >= size:
            yield from passage()
            held.clear()
            length = new = 0
    yield from passage()


def _parts(text: str, line: int, size: int) -> Iterator[tuple[int, str]]:
    """Lines with their line ends, longer ones in parts."""
    for number, whole in enumerate(text.splitlines(keepends=True), line):
        rest = whole
        while len(rest) > size:
            at = rest.rfind(" ", size // 2, size) + 1 or size
            yield number, rest[:at]
            rest = rest[at:]
        yield number, rest
