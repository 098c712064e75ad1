"""Successive halving: how far trials train before they are compared, and which of them go on.

A trial pauses at each rung; the best 1/``factor`` of those that have come to a rung go on to the
next, at any time (Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020,
algorithm 2). A paused trial is a run that was stopped: it goes on from its checkpoint. Hyperband
(Li et al., 2018) divides the trials among brackets, which begin at different rungs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil


@dataclass(frozen=True)
class Climber:
    """A trial as halving sees it; one that has failed is none.

    ``bracket`` is the index of its first rung, ``values`` maps rungs to its objective there (lower
    is better). It ``trains``, or it ``waits`` at the highest of its rungs, or it has ended.
    ``always`` lets it go on whatever its values are.
    """

    number: int
    bracket: int = 0
    values: Mapping[int, float] = field(default_factory=dict)
    trains: bool = False
    waits: bool = False
    always: bool = False

    @property
    def rung(self) -> int:
        """The highest rung that it has come to; -1 before the first."""
        return max(self.values, default=-1)


def shares(factor: int, least: float) -> tuple[float, ...]:
    """The rungs as shares of a trial's steps, the last one its end: 1, 1/factor, … down to
    ``least``.

    >>> [round(share, 3) for share in shares(3, 0.1)]
    [0.111, 0.333, 1.0]
    """
    found = [1.0]
    while found[0] / factor >= least * (1 - 1e-9):
        found.insert(0, found[0] / factor)
    return tuple(found)


def step_of(share: float, total: int) -> int:
    """The step of a trial of ``total`` steps at which it has trained this share of them."""
    return min(total, max(1, round(share * total)))


def bracket_of(number: int, rungs: int, factor: int) -> int:
    """The bracket of a trial in hyperband. Brackets that stop trials early have more of them, in
    proportion ceil(rungs · factor^s / (s + 1)) for the bracket that skips ``rungs - 1 - s`` rungs;
    the numbers are spread so that every beginning of the trials has about these shares.

    >>> [bracket_of(number, 3, 3) for number in range(8)]
    [0, 1, 0, 2, 0, 1, 0, 2]
    """
    weights = [ceil(rungs * factor**s / (s + 1)) for s in reversed(range(rungs))]
    counts = [0] * rungs
    for index in range(number + 1):
        lacks = [(index + 1) * w / sum(weights) - c for w, c in zip(weights, counts, strict=True)]
        chosen = lacks.index(max(lacks))
        counts[chosen] += 1
    return chosen


def promotable(
    climbers: Sequence[Climber], rungs: int, factor: int, *, all_there: bool
) -> list[int]:
    """The numbers of the waiting trials that go on, the furthest and best first.

    ``all_there`` says that no new trial will begin. Once nobody can come to a rung any more, its
    best one goes on even of fewer than ``factor``: a trial of each bracket comes to the end.
    """
    found: list[tuple[int, float, int]] = []
    for bracket in sorted({each.bracket for each in climbers}):
        members = [each for each in climbers if each.bracket == bracket]
        coming = not all_there
        for rung in range(bracket, rungs - 1):
            coming = coming or any(m.trains and m.rung < rung for m in members)
            there = sorted(
                (m for m in members if rung in m.values), key=lambda m: (m.values[rung], m.number)
            )
            count = len(there) // factor
            count = count if coming else max(1, count)
            going = {m.number for m in there[:count]} | {m.number for m in there if m.always}
            waiting = [m for m in there if m.waits and m.rung == rung and m.number in going]
            found += [(-rung, m.values[rung], m.number) for m in waiting]
            coming = coming or bool(waiting)
    return [number for _, _, number in sorted(found)]
