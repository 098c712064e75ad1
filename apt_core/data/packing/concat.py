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
        num_targets = num_tokens = targets.size
        document_ids, beyond = None, self._beyond(starts)
        if (ignored := self._ignored(starts, beyond)) is not None:
            targets[ignored] = IGNORED
            num_targets -= int(np.count_nonzero(ignored))
        if beyond:
            last = self.part.num_tokens - 1
            document_ids = np.where(starts[:, None] + np.arange(self.seq_len) < last, 0, -1)
            num_tokens -= int(np.count_nonzero(document_ids))
        return Rows(input_ids, targets, num_targets, num_tokens, document_ids)

    def num_targets(self, indices: Ints) -> int:
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        ignored = self._ignored(starts, self._beyond(starts))
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

    def _beyond(self, starts: Ints) -> bool:
        """Whether one of these windows has less than T tokens, and so padding."""
        return len(starts) > 0 and int(starts.max()) + self.seq_len >= self.part.num_tokens

    def _ignored(self, starts: Ints, beyond: bool) -> Ints | None:
        """Which targets are beyond the end or not to be learned; None where there is none."""
        if self.part.marked:
            return ~self.part.learned(starts + 1, self.seq_len)
        if not beyond:
            return None
        return starts[:, None] + np.arange(1, self.seq_len + 1) >= self.part.num_tokens
