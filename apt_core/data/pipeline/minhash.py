"""Signatures of texts (MinHash), by which documents that nearly repeat each other are found.

One permutation hashing (Li, Owen and Zhang, 2012) with optimal densification (Shrivastava, 2017):
the time is that of hashing the text once, whatever the length of the signature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SHINGLE = 13
"""Characters of the stretches of text that are compared."""

BINS = 128
"""The values of a signature."""

SURE = 0.99
"""The probability with which a pair at the threshold is compared."""

STRETCH = 1 << 15
"""Characters that are hashed at a time."""


def signature(text: str) -> npt.NDArray[np.uint32]:
    """The signature of a text, [BINS]. The share of places at which two of them are equal estimates
    the Jaccard similarity of the sets of shingles, upper case and white space apart."""
    import numpy as np

    text = " ".join(text.casefold().split()).ljust(SHINGLE)
    least = np.full(BINS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(text) - SHINGLE + 1, STRETCH):
        hashes = _hashes(text[start : start + STRETCH + SHINGLE - 1])
        # The high bits say the bin, the others what is compared in it.
        bins = (hashes >> np.uint64(57)).astype(np.intp)
        np.minimum.at(least, bins, hashes)
    return _densified(least)


def _hashes(text: str) -> npt.NDArray[np.uint64]:
    """A hash of each shingle, 64 bits that are mixed well."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(points) - SHINGLE + 1
    found = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        found = found * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + count]
    return _mixed(found)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _densified(least: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """The least hash of each bin, 32 bits; an empty bin has that of the first bin that is not, in
    an order of its own."""
    import numpy as np

    empty = np.flatnonzero(least == np.iinfo(np.uint64).max)
    full = least != np.iinfo(np.uint64).max
    source = np.arange(BINS)
    attempt = 0
    while len(empty):
        attempt += 1
        drawn = _mixed(empty.astype(np.uint64) * np.uint64(0x10001) + np.uint64(attempt << 32))
        chosen = (drawn % np.uint64(BINS)).astype(np.intp)
        good = full[chosen]
        source[empty[good]] = chosen[good]
        empty = empty[~good]
    return (least[source] & np.uint64(0xFFFFFFFF)).astype(np.uint32)


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
    import numpy as np

    count = BINS // rows
    bands = values[: count * rows].reshape(count, rows).astype(np.uint64)
    found = np.arange(1, count + 1, dtype=np.uint64)
    for row in range(rows):
        found = _mixed(found * np.uint64(0x9E3779B97F4A7C15) + bands[:, row])
    return [int(value) >> 1 for value in found]
