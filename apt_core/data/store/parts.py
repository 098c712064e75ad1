"""Parts of token stores: one long row of ids with the borders of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from apt_core.providers.tokenizer import Encoded

Ints = npt.NDArray[Any]
Marks = npt.NDArray[np.bool_]


class Stretches(NamedTuple):
    """Stretches of a part: arrays that hold their ids and, where the part is marked, which of them
    are to be learned, and where in these arrays each stretch begins, int64 [n]."""

    ids: Ints
    learned: Marks | None
    begins: Ints


class TokenPart(Protocol):
    """The ids of all documents of a part, one after the other.

    ``num_bytes`` counts the UTF-8 bytes of what is to be learned. Only a ``marked`` part has tokens
    that are not. Documents are numbered from 0, tokens too.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def marked(self) -> bool: ...

    def read(self, start: int, stop: int) -> Ints:
        """The ids ``start`` to ``stop``; less where the part ends before."""

    def marks(self, start: int, stop: int) -> Marks:
        """Whether each of these tokens is to be learned."""

    def windows(self, starts: Ints, length: int) -> Ints:
        """The ``length`` ids from each of ``starts`` [n] on, [n, length]; beyond the end the last
        one is repeated."""

    def learned(self, starts: Ints, length: int) -> Marks:
        """Which of the ids of :meth:`windows` are to be learned, [n, length]; none beyond the
        end."""

    def stretches(self, starts: Ints, lengths: Ints) -> Stretches:
        """The ids of the stretches that begin at ``starts`` and are ``lengths`` long, both
        int64 [n], all within the part."""

    def spans(self, first: int, last: int) -> Ints:
        """The first token of each of the documents ``first`` to ``last``, and the end of the last
        one: uint64 [last - first + 1]."""

    def document_at(self, token: int) -> int:
        """The document of a token."""


class ArrayPart:
    """A part in memory, of the ids 1-D of one document after the other.

    ``ends`` are the ends of the documents, by default there is one; ``learned`` says which tokens
    are to be learned, by default all. ``num_bytes`` is that of :class:`TokenPart`.
    """

    def __init__(
        self,
        ids: Ints,
        ends: Sequence[int] | Ints | None = None,
        learned: Marks | None = None,
        num_bytes: int = 0,
    ) -> None:
        self._ids, self._learned = ids, learned
        self._ends = np.asarray([len(ids)] if ends is None else ends, dtype=np.uint64)
        self.num_bytes = num_bytes

    @classmethod
    def of(cls, documents: Sequence[Encoded], num_bytes: int = 0) -> ArrayPart:
        """The part of these encoded documents."""
        arrays = [document.ids for document in documents]
        learned = None
        if any(document.learned is not None for document in documents):
            learned = np.concatenate(
                [
                    np.ones(len(d.ids), dtype=bool) if d.learned is None else d.learned
                    for d in documents
                ]
            )
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.uint8)
        return cls(ids, np.cumsum([len(a) for a in arrays]), learned, num_bytes)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._ids.dtype

    @property
    def marked(self) -> bool:
        return self._learned is not None

    def read(self, start: int, stop: int) -> Ints:
        return self._ids[start:stop]

    def marks(self, start: int, stop: int) -> Marks:
        if self._learned is None:
            return np.ones(max(0, min(stop, self.num_tokens) - start), dtype=bool)
        return self._learned[start:stop]

    def windows(self, starts: Ints, length: int) -> Ints:
        return windows_in(self._ids, np.asarray(starts, dtype=np.int64), length)

    def learned(self, starts: Ints, length: int) -> Marks:
        learned = np.ones(len(self._ids), dtype=bool) if self._learned is None else self._learned
        return learned_in(learned, np.asarray(starts, dtype=np.int64), length)

    def stretches(self, starts: Ints, lengths: Ints) -> Stretches:
        return Stretches(self._ids, self._learned, starts)

    def spans(self, first: int, last: int) -> Ints:
        before = self._ends[first - 1 : first] if first else np.zeros(1, np.uint64)
        return np.concatenate([before, self._ends[first:last]])

    def document_at(self, token: int) -> int:
        return int(np.searchsorted(self._ends, token, side="right"))


def windows_in(ids: Ints, starts: Ints, length: int) -> Ints:
    """The ``length`` of ``ids``, 1-D and contiguous, from each of ``starts`` [n], int64, on,
    [n, length]; beyond the end the last one is repeated. Raises ValueError for negative starts, or
    without any id."""
    places = len(ids) - length + 1
    if len(starts) and starts.max() < places and starts.min() >= 0:
        # Rows of a view are copied whole, and not id by id.
        return np.ndarray((places, length), ids.dtype, ids, 0, ids.strides * 2)[starts]
    require_starts(starts, len(ids))
    return ids.take(starts[:, None] + np.arange(length), mode="clip")


def learned_in(learned: Marks, starts: Ints, length: int) -> Marks:
    """:func:`windows_in` of which ids are to be learned: none beyond the end."""
    found: Marks = windows_in(learned, starts, length)
    for row in np.flatnonzero(starts + length > len(learned)):
        found[row, max(0, len(learned) - int(starts[row])) :] = False
    return found


def require_starts(starts: Ints, num_tokens: int) -> None:
    """Raise ValueError for windows that cannot start at ``starts`` in a part of so many tokens."""
    if not num_tokens:
        raise ValueError("the part has no tokens")
    if len(starts) and int(starts.min()) < 0:
        raise ValueError("windows cannot start before the part")
