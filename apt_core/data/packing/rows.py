"""What every packing offers: windows, by number, as rows of ids and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

IGNORED = -100
"""The target of a position that is not predicted."""

Ints = npt.NDArray[Any]


@dataclass
class Rows:
    """Windows as rows: input ``ids`` and ``targets``, int64 [n, T]; a target of -100 is ignored.
    ``num_targets`` counts the others, ``num_tokens`` the positions that are not padding.

    ``document_ids`` [n, T] number the documents of a row that do not see each other, -1 at padding;
    None where a row is read as one text without padding. ``packed`` says that a row may have more
    than one.
    """

    ids: Ints
    targets: Ints
    num_targets: int
    num_tokens: int
    document_ids: Ints | None = None
    packed: bool = False


class Extract(NamedTuple):
    """The tokens of a document that a window has: ``num_tokens`` from ``first_token`` on, which
    counts from the document's start."""

    document: int
    first_token: int
    num_tokens: int


class Windows(Protocol):
    """Windows of ``seq_len`` positions, numbered from 0."""

    @property
    def seq_len(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """The positions of all windows that are not padding."""

    def __len__(self) -> int: ...

    def rows(self, indices: Ints) -> Rows:
        """The windows of these numbers, int64 [n]."""

    def num_targets(self, indices: Ints) -> int:
        """How many targets they have together."""

    def extracts(self, index: int) -> list[Extract]:
        """What the window is made of."""
