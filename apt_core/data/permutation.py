"""Permutations of 0..N-1 that are computed index by index, in constant memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 4

SORTED_UP_TO = 1024
"""Permutations of so few are sorted random numbers: a cipher of few bits is not random enough."""

_MASK = (1 << 64) - 1


def permuted(indices: npt.NDArray[Any], size: int, key: int) -> npt.NDArray[np.int64]:
    """The images of ``indices`` [n], all below ``size``, under a permutation of 0..size-1 that
    ``key`` chooses; int64 [n].

    A cipher of the bits of an index permutes the next power of two, and is applied again to what
    falls beyond ``size`` (cycle walking), less than twice on average. Integers alone are used, so
    that no version of a library changes the order.
    """
    if size <= SORTED_UP_TO:
        return _sorted(size, key)[indices]
    found = np.asarray(indices).astype(np.uint64)
    bits = (size - 1).bit_length()
    keys = _keys(key, 2 * ROUNDS)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        found[outside] = _cipher(found[outside], bits, keys)
        outside = found >= size
    return found.astype(np.int64)


@lru_cache(maxsize=16)
def _sorted(size: int, key: int) -> npt.NDArray[np.int64]:
    drawn = np.array(_keys(key, size), dtype=np.uint64)
    order = np.argsort(drawn, kind="stable")
    order.flags.writeable = False
    return order


def _cipher(values: npt.NDArray[np.uint64], bits: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    """Steps that can each be undone within ``bits`` bits: add, multiply by an odd number, and xor
    with the upper half."""
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    for add, factor in zip(keys[::2], keys[1::2], strict=True):
        values = (values + np.uint64(add)) & mask
        values = (values * np.uint64(factor | 1)) & mask
        values = values ^ (values >> half)
    return values


def _keys(key: int, number: int) -> list[int]:
    """``number`` well mixed 64-bit integers (SplitMix64, Steele et al. 2014)."""
    found, state = [], key & _MASK
    for _ in range(number):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        found.append(z ^ (z >> 31))
    return found


@lru_cache(maxsize=64)
def mixed(*parts: int) -> int:
    """One 64-bit key of several integers."""
    key = 0
    for part in parts:
        key = _keys(key ^ (part & _MASK), 1)[0]
    return key
