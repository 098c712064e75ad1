"""Products of many experts' rows with their matrices, on a CPU.

A product of few rows does not share out well among threads, and two such products in one call do.
Experts of nearly as many rows are therefore neighbours, the one with more rows first: taken for two
of that size the second reaches into the rows that follow, whose own results are written later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE_ROWS = 1 / 8
"""A pair computes at most this part of its first expert's rows in vain."""


@dataclass(frozen=True)
class Group:
    """One or two experts, in ascending order, and their rows from ``start`` on."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + sum(self.counts)

    @property
    def reach(self) -> int:
        """Where the rows end that its products write."""
        return self.start + len(self.counts) * self.counts[0]

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Each expert with its first row and the end of its rows."""
        start = self.start
        for expert, count in zip(self.experts, self.counts, strict=True):
            yield expert, start, start + count
            start += count


def group(counts: list[int], start: int) -> list[Group]:
    """All experts with rows, of which there are ``counts``, with the most rows first."""
    end = start + sum(counts)
    waiting = sorted((e for e, n in enumerate(counts) if n), key=lambda e: -counts[e])
    groups = []
    while waiting:
        first = waiting.pop(0)
        rows = counts[first]
        for i, second in enumerate(waiting):
            if counts[second] < rows * (1 - SPARE_ROWS):
                break
            # As a view of the matrices a pair has a positive step.
            if second > first and start + 2 * rows <= end:
                del waiting[i]
                groups.append(Group((first, second), (rows, counts[second]), start))
                break
        if not groups or groups[-1].start != start:
            groups.append(Group((first,), (rows,), start))
        start = groups[-1].stop
    return groups


def multiply(
    rows: Tensor,
    matrices: Tensor,
    group: Group,
    out: Tensor,
    *,
    rows_start: int = 0,
    out_start: int = 0,
    add: bool = False,
) -> None:
    """The rows [., I] of a group with its experts' ``matrices`` [E, I, O], to ``out`` [., O].

    ``rows_start`` and ``out_start`` are the numbers of the first rows that ``rows`` and ``out``
    hold. With ``add`` it is added to what ``out`` has.
    """
    number, size = len(group.experts), group.counts[0]
    left = rows[group.start - rows_start : group.reach - rows_start]
    to = out[group.start - out_start : group.reach - out_start]
    if number == 1:
        matrix = matrices[group.experts[0]]
        if add:
            to.addmm_(left, matrix)
        else:
            torch.mm(left, matrix, out=to)
        return
    first, second = group.experts
    pair = matrices[first : second + 1 : second - first]
    left, to = left.view(2, size, -1), to.view(2, size, -1)
    if add:
        to.baddbmm_(left, pair)
    else:
        torch.bmm(left, pair, out=to)
