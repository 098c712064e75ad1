"""Reuses the memory of experts' gradients on a CPU from step to step.

The C library returns freed blocks of 32 MiB and more to the system, which clears each page when it
is allocated again; in every step this takes longer than writing the gradient.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

FRESH_BYTES = 32 * 2**20
"""The size from which the C library returns freed blocks to the system."""
HUGE_PAGE = 2 * 2**20

_free: list[mmap.mmap] = []
"""Free blocks."""


def gradient_like(weight: Tensor) -> Tensor:
    """A contiguous uninitialised tensor with the shape and dtype of ``weight``."""
    if weight.nbytes < FRESH_BYTES:
        return torch.empty_like(weight)
    try:
        block = _take(weight.nbytes + HUGE_PAGE)
    except OSError:
        # torch's error says how much memory is missing.
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
    # Free blocks of other sizes, which may not be needed any more.
    _free.clear()
    # Private, so that a forked process gets a copy and huge pages are possible.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Only advice: a refusal costs time and nothing else.
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
