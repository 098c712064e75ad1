"""Signatures of texts (MinHash), by which documents that nearly repeat each other are found.

Fast similarity sketching (Dahlgaard, Knudsen and Thorup, 2017): the time is that of hashing a text
once, whatever the length of the signature, and short texts are compared as well as long ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SHINGLE = 13
"""Characters of the stretches of text that are compared."""

BINS = 128
"""The values of a signature."""

SURE = 0.99
"""The probability with which a pair at the threshold is compared."""

ROUNDS = 64
"""Rounds of hashes; those after the first serve the bins that are empty, of short texts."""

ROUND_HASHES = 512
"""Hashes of such rounds that are computed at a time."""

STRETCH = 1 << 15
"""Characters that are hashed at a time."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EMPTY = np.uint64((1 << 64) - 1)


def signature(text: str) -> npt.NDArray[np.uint32]:
    """The signature of a text, [BINS]. The share of places at which two of them are equal estimates
    the Jaccard similarity of the sets of shingles, upper case and white space apart."""
    text = " ".join(text.casefold().split()).ljust(SHINGLE)
    least = np.full(BINS, EMPTY, np.uint64)
    distinct = np.empty(0, np.uint64)
    for start in range(0, len(text) - SHINGLE + 1, STRETCH):
        hashes = _hashes(text[start : start + STRETCH + SHINGLE - 1])
        _take_least(least, hashes, 0)
        if (least == EMPTY).any():
            distinct = np.unique(np.concatenate([distinct, hashes]))
    step = max(1, ROUND_HASHES // max(1, len(distinct)))
    for first in range(1, ROUNDS, step):
        if not (least == EMPTY).any():
            break
        rounds = np.arange(first, min(first + step, ROUNDS), dtype=np.uint64)[:, None]
        _take_least(least, _mixed(distinct + rounds * GOLDEN), rounds)
    empty = np.flatnonzero(least == EMPTY)
    # All hashes go to each bin that no round has reached.
    seeds = (empty.astype(np.uint64) + np.uint64(ROUNDS))[:, None] * GOLDEN
    if len(empty):
        least[empty] = _mixed(distinct + seeds).min(axis=1)
    return (least & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _take_least(
    least: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64], rounds: npt.NDArray[Any] | int
) -> None:
    """Put the least hash of each bin into ``least``, those of earlier rounds first. The highest
    bits of a hash say its bin."""
    bins = (hashes >> np.uint64(57)).astype(np.intp)
    ranked = (hashes & np.uint64((1 << 57) - 1)) | (np.asarray(rounds, np.uint64) << np.uint64(57))
    np.minimum.at(least, bins.ravel(), ranked.ravel())


def _hashes(text: str) -> npt.NDArray[np.uint64]:
    """A hash of each shingle, 64 bits that are mixed well."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(points) - SHINGLE + 1
    found = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        found = found * GOLDEN + points[offset : offset + count]
    return _mixed(found)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def band_rows(threshold: float) -> int:
    """How many values a band has: the most with which a pair of that similarity has an equal band
    with probability SURE."""
    return max(
        (rows for rows in range(1, BINS + 1) if _probability(threshold, rows) >= SURE), default=1
    )


def _probability(similarity: float, rows: int) -> float:
    return 1 - (1 - similarity**rows) ** (BINS // rows)


def band_hashes(values: npt.NDArray[np.uint32], rows: int) -> list[int]:
    """A hash (63 bits) of each band of a signature."""
    count = BINS // rows
    bands = values[: count * rows].reshape(count, rows).astype(np.uint64)
    found = np.arange(1, count + 1, dtype=np.uint64)
    for row in range(rows):
        found = _mixed(found * GOLDEN + bands[:, row])
    return [int(value) >> 1 for value in found]
