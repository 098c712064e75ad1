"""Packing ``concat``: the documents of a part one after the other, cut every T tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from apt_core.data.packing.rows import IGNORED, Extract, Ints, Rows
from apt_core.data.store.parts import TokenPart


@dataclass(frozen=True)
class ConcatWindows:
    """Window i holds tokens iT..iT+T-1 and predicts tokens iT+1..iT+T, so that every token but the
    very first is predicted exactly once; the last window may have fewer targets. A token may see
    those of the documents before its own."""

    part: TokenPart
    seq_len: int

    def __len__(self) -> int:
        return -(-self.num_tokens // self.seq_len)

    @property
    def num_tokens(self) -> int:
        return max(0, self.part.num_tokens - 1)

    def rows(self, indices: Ints) -> Rows:
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        cut = self.part.windows(starts, self.seq_len + 1)
        # Contiguous, as all batches are: a compiled model would be compiled for other strides.
        input_ids, targets = (part.astype(np.int64) for part in (cut[:, :-1], cut[:, 1:]))
        if (ignored := self._ignored(starts)) is not None:
            targets = np.where(ignored, IGNORED, targets)
        return Rows(input_ids, targets, self._document_ids(starts))

    def num_targets(self, indices: Ints) -> int:
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        ignored = self._ignored(starts)
        return len(starts) * self.seq_len - (0 if ignored is None else int(ignored.sum()))

    def extracts(self, index: int) -> list[Extract]:
        part, start = self.part, index * self.seq_len
        stop = min(start + self.seq_len, part.num_tokens)
        first, last = part.document_at(start), part.document_at(stop - 1)
        spans = part.spans(first, last + 1).astype(np.int64)
        found = []
        for number, (begin, end) in enumerate(pairwise(spans.tolist())):
            inside = max(begin, start)
            taken = min(end, stop) - inside
            if taken > 0:
                found.append(Extract(first + number, inside - begin, taken))
        return found

    def _document_ids(self, starts: Ints) -> Ints | None:
        """0, and -1 for padding; None where there is none."""
        last, length = self.part.num_tokens - 1, self.seq_len
        if not len(starts) or int(starts.max()) + length <= last:
            return None
        return np.where(starts[:, None] + np.arange(length) < last, 0, -1)

    def _ignored(self, starts: Ints) -> Ints | None:
        """Which targets are beyond the end or not to be learned; None where there is none."""
        last, length = self.part.num_tokens - 1, self.seq_len
        beyond = len(starts) > 0 and int(starts.max()) + length > last
        if not beyond and not self.part.marked:
            return None
        ignored = starts[:, None] + np.arange(1, length + 1) > last
        if self.part.marked:
            for row, start in enumerate(starts.tolist()):
                marks = self.part.marks(start + 1, start + 1 + length)
                ignored[row, : len(marks)] |= ~marks
        return ignored
