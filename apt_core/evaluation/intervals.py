"""Intervals of scores, over the items that they are means of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]
Transform = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]

CONFIDENCE = 0.95
Z = 1.959963984540054
"""The quantile of the normal distribution for CONFIDENCE."""

RESAMPLES = 1000
MIN_ITEMS = 5
"""A bootstrap over fewer says nothing."""

DRAWN = 1 << 22
"""The most items that are drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """An interval of CONFIDENCE, and how it was made: ``wilson`` (of a share), ``agresti-min`` (of
    a difference of shares) or ``bootstrap`` (over items)."""

    low: float
    high: float
    method: str


def wilson(successes: int, total: int) -> Interval:
    """Wilson's score interval of a share (Wilson, 1927, J. Am. Stat. Assoc. 22, 209).

    >>> [round(bound, 3) for bound in (wilson(8, 10).low, wilson(8, 10).high)]
    [0.49, 0.943]
    """
    share, square = successes / total, Z * Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = sqrt(share * (1 - share) / total + square / (4 * total * total))
    half *= Z / (1 + square / total)
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "wilson")


def interval_of(sums: Sums, transform: Transform) -> Interval | None:
    """The interval of ``transform(total of sums[:, 0] / total of sums[:, 1])``, for ``sums`` [n, 2]
    of n items: :func:`wilson` of items that are right or wrong, else the percentiles of a bootstrap
    over the items. None for fewer than MIN_ITEMS."""
    if len(sums) < MIN_ITEMS:
        return None
    if _is_share(sums):
        return wilson(int(sums[:, 0].sum()), len(sums))
    return _percentiles(transform(_ratios(sums)))


def agresti_min(only_first: int, only_second: int, total: int) -> Interval:
    """Interval of the second share less the first one, of ``total`` items of which the first alone
    has ``only_first`` and the second alone ``only_second`` (Agresti and Min, 2005, Statistics in
    Medicine 24, 729: the interval of Wald, with half an item more of each kind)."""
    less, more, items = only_first + 0.5, only_second + 0.5, total + 2
    middle = (more - less) / items
    half = Z * sqrt(max(0.0, less + more - (more - less) ** 2 / items)) / items
    return Interval(max(-1.0, middle - half), min(1.0, middle + half), "agresti-min")


def difference_of(first: Sums, second: Sums, transform: Transform) -> Interval | None:
    """The interval of the second score less the first one, where both were measured on the same
    items: :func:`agresti_min` of items that are right or wrong, else a bootstrap in each of whose
    draws both have the same items. None for fewer than MIN_ITEMS."""
    if len(first) < MIN_ITEMS:
        return None
    if _is_share(first) and _is_share(second):
        gained = second[:, 0] - first[:, 0]
        return agresti_min(int((gained < 0).sum()), int((gained > 0).sum()), len(first))
    return _percentiles(transform(_ratios(second)) - transform(_ratios(first)))


def _is_share(sums: Sums) -> bool:
    return bool((sums[:, 1] == 1).all() and np.isin(sums[:, 0], (0, 1)).all())


def _ratios(sums: Sums) -> npt.NDArray[np.float64]:
    """The ratio of the totals in each of RESAMPLES draws of as many items, the same for any
    ``sums`` of as many."""
    rng, number = np.random.default_rng(0), len(sums)
    found = np.empty((RESAMPLES, 2))
    size = max(1, DRAWN // number)
    for first in range(0, RESAMPLES, size):
        last = min(RESAMPLES, first + size)
        drawn = rng.integers(0, number, size=(last - first, number))
        found[first:last] = sums[drawn].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return found[:, 0] / found[:, 1]


def _percentiles(values: npt.NDArray[np.float64]) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, (outside, 1 - outside), method="nearest")
    return Interval(float(low), float(high), "bootstrap")
