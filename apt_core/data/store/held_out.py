"""The documents that are held out by their split position, as long as there may be too many."""

from __future__ import annotations

import heapq
from dataclasses import replace

from apt_core.data.store.chunks import Prepared


class HeldOut:
    """Keeps the documents of the least split positions, those that have together at most ``most``
    characters; all of one position stay or go together.

    Which ones they are does not depend on the order in which they come, but for those that were
    settled before. Memory is bounded by ``most`` and one more document.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_chars = self._added = 0
        self._groups: dict[int, list[tuple[int, Prepared]]] = {}
        self._positions: list[int] = []
        self._below: int | None = None
        self._settled: set[int] = set()

    def add(self, document: Prepared) -> list[Prepared]:
        """Take a document; those, it may be one of them, that are not held out after all."""
        position = document.position
        if self._below is not None and position >= self._below:
            return [document]
        if position not in self._groups:
            heapq.heappush(self._positions, -position)
        # The arrays of a document are views of those of its whole chunk.
        pieces = tuple(
            replace(
                piece,
                ids=piece.ids.copy(),
                learned=None if piece.learned is None else piece.learned.copy(),
            )
            for piece in document.pieces
        )
        kept = replace(document, pieces=pieces, signature=None)
        self._groups.setdefault(position, []).append((self._added, kept))
        self._added += 1
        self._num_chars += document.num_chars
        left_out: list[Prepared] = []
        while self._num_chars > self._most and self._positions:
            self._below = -heapq.heappop(self._positions)
            group = [each for _, each in self._groups.pop(self._below)]
            self._num_chars -= sum(each.num_chars for each in group)
            left_out += group
        return left_out

    def is_settled(self, document: Prepared) -> bool:
        """Whether others of its position are held out for good, and it with them."""
        return document.position in self._settled

    @property
    def all_too_long(self) -> bool:
        """Whether documents came, and none is left."""
        return self._below is not None and not self._groups and not self._settled

    def settle(self) -> list[Prepared]:
        """The documents that are kept, in the order in which they came. They stay held out, and so
        do further ones of their positions; of others there is as much less room."""
        found = sorted(
            (each for group in self._groups.values() for each in group), key=lambda pair: pair[0]
        )
        self._settled.update(self._groups)
        self._groups, self._positions = {}, []
        return [document for _, document in found]
