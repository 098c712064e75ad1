"""Series of metrics, prepared for drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apt_core.metric_names import CROSS_ENTROPY

Array = NDArray[np.float64]

LARGEST = 1e30
"""Larger values count as not finite: no axis can show them."""

SMALLEST = 1e-100
"""Smaller values are drawn as 0: no axis can show them."""


@dataclass(frozen=True)
class Series:
    """Values ``raw`` [N] of one metric at ascending steps ``x`` [N], one value a step."""

    name: str
    x: Array
    raw: Array

    @cached_property
    def y(self) -> Array:
        """The values to draw: NaN for those not finite or too large, 0 for those too small."""
        size = np.abs(self.raw)
        drawn = np.where(size < SMALLEST, 0.0, self.raw) if (size < SMALLEST).any() else self.raw
        drawable = size <= LARGEST
        return drawn if drawable.all() else np.where(drawable, drawn, np.nan)

    def where(self, kept: NDArray[np.bool_]) -> Series:
        return Series(self.name, self.x[kept], self.raw[kept])

    @property
    def finite(self) -> Series:
        return self.where(np.isfinite(self.y))


def training_loss(series: Mapping[str, Series]) -> Series | None:
    """The cross-entropy of each step; where a row lacks it, the loss less its terms."""
    entropy, loss = series.get(CROSS_ENTROPY), series.get("loss")
    if loss is None or (entropy is not None and entropy.x.size == loss.x.size):
        return entropy if entropy is not None else loss
    rest = loss.raw.copy()
    for name, term in series.items():
        if name.startswith("loss/"):
            _, at, of = np.intersect1d(loss.x, term.x, return_indices=True)
            rest[at] -= term.raw[of]
    if entropy is not None:
        _, at, of = np.intersect1d(loss.x, entropy.x, return_indices=True)
        rest[at] = entropy.raw[of]
    return Series("loss", loss.x, rest)


MAX_EXTENTS = 3
"""Evaluations of more amounts of text than this are drawn as one curve."""


def by_extent(scores: Series, tokens: Series | None) -> list[tuple[Series, str]]:
    """``scores`` of held-out text apart by how many ``tokens`` of it were scored, each with that as
    text: a score of a part of it is no point of the curve of the whole. Those of most evaluations
    come first; all together where no two sets of them could be compared."""
    told = tokens is not None and np.array_equal(scores.x, tokens.x)
    if tokens is None or not told or not np.isfinite(tokens.raw).all():
        return [(scores, "")]
    extents, first, times = np.unique(tokens.raw, return_index=True, return_counts=True)
    if not 1 < extents.size <= MAX_EXTENTS:
        return [(scores, "")]
    order = np.lexsort((first, -times))
    return [(scores.where(tokens.raw == n), f"{int(n):,} tokens") for n in extents[order]]
