"""Reduces the points of a curve so that outliers of a long run stay visible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from apt_plugins.report.metrics import Array, Series


def thin(places: Array, values: Array, buckets: int) -> NDArray[np.intp]:
    """Indices of the points to draw, in order: the lowest and the highest value of each bucket.

    ``places`` [N] are ascending shares of the width, 0 to 1; ``values`` [N] may be NaN. The first
    and the last point are kept, and one NaN per bucket, which keeps the gap visible.
    """
    count = places.size
    if count <= 2 * buckets:
        return np.arange(count)
    bucket = np.minimum((places * buckets).astype(np.int64), buckets - 1)
    # NaN sorts last: a bucket's lowest value is its first entry, its highest the last finite one.
    order = np.lexsort((values, bucket))
    finite = np.isfinite(values)
    by_value = order[finite[order]]
    kept = [_firsts(by_value, bucket), _firsts(by_value[::-1], bucket)]
    kept += [_firsts(np.flatnonzero(~finite), bucket), np.array([0, count - 1])]
    return np.unique(np.concatenate(kept))


def _firsts(indices: NDArray[np.intp], bucket: NDArray[np.int64]) -> NDArray[np.intp]:
    """The first index of each bucket; ``indices`` are grouped by bucket."""
    if not indices.size:
        return indices
    own = bucket[indices]
    return indices[np.append(True, own[1:] != own[:-1])]


def smoothed(series: Series, share: float = 0.02) -> Series:
    """The centred running mean over ``share`` of the points; values not finite are left out."""
    points = series.finite
    half = int(points.y.size * share / 2)
    if half < 1:
        return points
    sums = np.concatenate(([0.0], np.cumsum(points.y)))
    index = np.arange(points.y.size)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, points.y.size)
    return Series(series.name, points.x, (sums[last] - sums[first]) / (last - first))


def means(x: Array, values: Array, buckets: int) -> tuple[Array, Array]:
    """Means of ``values`` [N, K] over at most ``buckets`` groups of rows, and the last of the steps
    ``x`` [N] of each."""
    edges = np.unique(np.linspace(0, x.size, min(buckets, x.size) + 1).astype(np.int64))
    sizes = np.diff(edges)
    sums = np.add.reduceat(values, edges[:-1], axis=0)
    return x[edges[1:] - 1], sums / sizes[:, None]
