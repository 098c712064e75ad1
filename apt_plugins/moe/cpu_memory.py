"""Memory for the gradients of experts on a CPU, kept from step to step.

The C library returns 32 MiB and more to the system whenever they are freed, and the system clears
each page that it gives anew: at every step, for longer than a gradient takes to be written.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

FRESH_BYTES = 32 * 2**20
"""From this size on the C library keeps nothing."""
HUGE_PAGE = 2 * 2**20

_free: list[mmap.mmap] = []
"""Blocks that no tensor uses."""


def gradient_like(weight: Tensor) -> Tensor:
    """A tensor of unspecified numbers with the shape and type of ``weight``, contiguous."""
    if weight.nbytes < FRESH_BYTES:
        return torch.empty_like(weight)
    try:
        block = _take(weight.nbytes + HUGE_PAGE)
    except OSError:
        # torch tells how much memory is missing.
        return torch.empty_like(weight)
    numbers = np.frombuffer(block, dtype=np.uint8)
    # torch holds the array for as long as a tensor uses its memory.
    weakref.finalize(numbers, _free.append, block).atexit = False
    first = -numbers.ctypes.data % HUGE_PAGE
    used = torch.from_numpy(numbers)[first : first + weight.nbytes]
    return used.view(weight.dtype).view(weight.shape)


def _take(size: int) -> mmap.mmap:
    for i, block in enumerate(_free):
        if len(block) == size:
            return _free.pop(i)
    # Blocks of sizes that are not asked for any more must not pile up.
    _free.clear()
    # Private: a forked process gets a copy, and huge pages are had.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Advice: where it is refused nothing is lost but time.
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
