"""Products of many experts' rows with their matrices, on a CPU.

A product of few rows does not share out well among threads, and two such products in one call do.
Experts of nearly as many rows are therefore taken in pairs, the smaller one padded. Legend as in
:mod:`apt_plugins.moe.cpu_experts`, and G one or two experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 8
"""A pair's padding is at most one in so many rows of its larger expert."""


@dataclass(frozen=True)
class Group:
    """One or two experts, in ascending order, that have places for ``rows`` rows each from
    ``start`` on."""

    experts: tuple[int, ...]
    rows: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.experts) * self.rows

    def rows_of(self, tensor: Tensor, first: int = 0) -> Tensor:
        """The group's part of [., I], whose first row has the place ``first``: [G, rows, I]."""
        part = tensor[self.start - first : self.stop - first]
        return part.view(len(self.experts), self.rows, -1)

    def matrices_of(self, tensor: Tensor) -> Tensor:
        """The group's part of [E, ., .]: [G, ., .]."""
        first, last = self.experts[0], self.experts[-1]
        return tensor[first : last + 1 : max(last - first, 1)]


def group(counts: Sequence[int]) -> list[Group]:
    """All experts with rows, of which there are ``counts``, the largest first."""
    waiting = sorted((e for e, n in enumerate(counts) if n), key=lambda e: -counts[e])
    groups: list[Group] = []
    start = 0
    while waiting:
        members = [waiting.pop(0)]
        rows = counts[members[0]]
        if waiting and (rows - counts[waiting[0]]) * SPARE <= rows:
            members.append(waiting.pop(0))
        groups.append(Group(tuple(sorted(members)), rows, start))
        start = groups[-1].stop
    return groups


def most_places(rows: int) -> int:
    """How many places so many rows need at the most, however they are shared out, and one more.

    Of a pair with r rows and its padding of r / SPARE at least 2r - r / SPARE are no padding.
    """
    return rows + rows // (2 * SPARE - 1) + 1


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out`` [G, M, O] becomes ``left`` [G, M, I] times ``right`` [G, I, O], or gets it added."""
    if len(left) > 1:
        if add:
            out.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=out)
    elif add:
        out[0].addmm_(left[0], right[0])
    else:
        torch.mm(left[0], right[0], out=out[0])
