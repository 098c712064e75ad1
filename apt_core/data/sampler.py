"""The order of the data: a pure function of (seed, epoch, index)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> npt.NDArray[Any]:
    """A permutation of 0..size-1 for ``epoch`` (from 1), read-only.

    It sorts raw PCG64 output, whose stream numpy guarantees between versions (it does not for
    ``Generator.permutation``). No global generator is involved.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(np.asarray(bits), kind="stable")
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def place_of_last(seed: int, epoch: int, size: int) -> int:
    """The position of the index ``size - 1`` in the :func:`epoch_order`."""
    return int(np.flatnonzero(epoch_order(seed, epoch, size) == size - 1)[0])
