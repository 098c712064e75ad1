"""Measures the peak FLOP/s of a device, the denominator of MFU."""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter

import torch

from apt_core.device import synchronize

SMALLEST, LARGEST = 256, 8192
TRIES = 3
ENOUGH = 0.015
"""Seconds for which products of one size are repeated: if other programs use the device, few of
them run undisturbed."""

LONGEST = 0.05
"""The most seconds that TRIES products of one size may take."""


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of ``dtype`` on ``device``.

    Returns the fastest of several products, with torch's present number of threads and settings
    (TF32); each combination is measured once a process. It takes less than 100 ms on a CPU, and up
    to 400 MiB of a GPU's memory meanwhile, so call it before the model is built. Draws no random
    numbers.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    precisions = tuple(backend.fp32_precision for backend in backends)
    return _peak(device, dtype, torch.get_num_threads(), precisions)


@lru_cache(maxsize=16)
def _peak(
    device: torch.device, dtype: torch.dtype, threads: int, precisions: tuple[str, ...]
) -> float:
    size, best = SMALLEST, 0.0
    while True:
        seconds = _shortest_product(size, device, dtype)
        best = max(best, 2 * size**3 / seconds)
        # Doubling the size takes eight times the work; the extra product is the warm-up.
        if size == LARGEST or 8 * seconds * (TRIES + 1) > LONGEST:
            return best
        size *= 2


@torch.no_grad()
def _shortest_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """The seconds of the fastest product of matrices [size, size]."""
    # Different values: with equal ones a GPU switches fewer bits and clocks higher.
    a = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    out = torch.empty_like(a)
    times: list[float] = []
    while len(times) <= TRIES or sum(times) < ENOUGH:
        synchronize(device)
        start = perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        times.append(perf_counter() - start)
    return min(times[1:])
