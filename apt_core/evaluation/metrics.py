"""Metrics: how what was found of each item makes a score."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, log

import numpy as np

from apt_core.evaluation.intervals import Sums, Transform, difference_of, interval_of


def _same(values: Sums) -> Sums:
    return values


def _exponential(values: Sums) -> Sums:
    with np.errstate(over="ignore"):
        return np.exp(values)


def _bits(values: Sums) -> Sums:
    return values / log(2)


TRANSFORMS: dict[str, Transform] = {"perplexity": _exponential, "bits_per_byte": _bits}
"""What makes a metric of the ratio of two sums over items, where it is not that ratio."""


@dataclass(frozen=True)
class Figure:
    """A score with its interval, which is None where there are too few items; ``method`` says how
    the interval was made."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


def figure_of(metric: str, sums: Sums) -> Figure:
    """The score of ``sums`` [n, 2]: for each item a numerator and a denominator."""
    transform = TRANSFORMS.get(metric, _same)
    value = _value(sums, transform)
    interval = interval_of(sums, transform)
    if interval is None:
        return Figure(value)
    return Figure(value, interval.low, interval.high, interval.method)


def difference_figure(metric: str, first: Sums, second: Sums) -> Figure:
    """The second score less the first; both were measured on the same items, in their order."""
    transform = TRANSFORMS.get(metric, _same)
    value = _value(second, transform) - _value(first, transform)
    interval = None if isnan(value) else difference_of(first, second, transform)
    if interval is None:
        return Figure(value)
    return Figure(value, interval.low, interval.high, interval.method)


def _value(sums: Sums, transform: Transform) -> float:
    total = sums.sum(axis=0)
    if not len(sums) or not total[1]:
        return float("nan")
    return float(transform(total[:1] / total[1:])[0])
