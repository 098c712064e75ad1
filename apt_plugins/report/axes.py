"""Axes of a chart: map values to shares of its width or height, and choose round ticks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from apt_plugins.report.metrics import Array
from apt_plugins.report.wording import number

LOG_FROM = 100.0
"""A positive quantity whose typical values span this factor is shown on a log scale."""


@dataclass(frozen=True)
class Axis:
    """The range from ``low`` to ``high``; they differ, and are positive where ``log``."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[Array], *, log: bool = False, zero: bool = False) -> Axis:
        """An axis around finite values with a margin; with ``zero`` it starts at 0, unless values
        are negative."""
        low = min(float(v.min()) for v in values)
        high = max(float(v.max()) for v in values)
        if log:
            low, high = log10(low), log10(high)
        # The least margin keeps the labels of ticks apart where values are equal or almost so.
        size = max(abs(low), abs(high)) or 2.0
        least = 0.5 * size if low == high else 5e-4 * size
        margin = max(0.05 * (high - low), least)
        low, high = (0.0 if zero and low >= 0 else low - margin), high + margin
        return cls(10**low, 10**high, True) if log else cls(low, high)

    def share(self, values: Array) -> Array:
        """The place of each value: 0 at ``low``, 1 at ``high``."""
        low, high = self._ends()
        return ((np.log10(values) if self.log else values) - low) / (high - low)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` round values as (share, label)."""
        low, high = self._ends()
        if self.log and high - low >= 1:
            every = max(1, ceil((high - low) / count))
            exponents = range(ceil(low), floor(high) + 1, every)
            values = [10.0**exponent for exponent in exponents]
            if len(values) < 3:
                values = [m * 10.0**e for e in range(floor(low), ceil(high) + 1) for m in (1, 2, 5)]
        else:
            step = _round_step((self.high - self.low) / count)
            first, last = ceil(self.low / step), floor(self.high / step)
            values = [index * step for index in range(first, last + 1)]
        shown = [value for value in values if self.low <= value <= self.high]
        shares = self.share(np.array(shown, dtype=np.float64)).tolist()
        return [(share, _label(value)) for share, value in zip(shares, shown, strict=True)]

    def _ends(self) -> tuple[float, float]:
        return (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)


def wants_log(values: Array) -> bool:
    """Whether all values are positive and span so much that a linear scale would flatten most."""
    if values.size < 5 or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.02, 0.98])
    return bool(high / low >= LOG_FROM)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** floor(log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _label(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= scale:
            scale = 1e3 if unit == "k" else scale
            return f"{value / scale:.5g}{unit}" if abs(value) < 1e13 else number(value)
    return number(float(f"{value:.5g}"))
