"""How much arithmetic this device does in a second, measured: what MFU is a share of."""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter

import torch

from apt_core.device import synchronize

SMALLEST, LARGEST = 256, 8192
TRIES = 3
ENOUGH = 0.015
"""Seconds after which a size has been tried often enough: where other programs use the device too,
few products run undisturbed."""

LONGEST = 0.05
"""Seconds that TRIES products of a size may take together."""


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of ``dtype`` on ``device``.

    The fastest of several, with the threads that torch has now and its present settings (TF32),
    measured once a process for each combination of them. It takes less than 100 ms on a CPU. A GPU
    gives up to 400 MiB of its memory for that long: best called before the model is there. No
    random number is drawn.
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
        # A product of twice the size is eight times the work; one more is the warm-up.
        if size == LARGEST or 8 * seconds * (TRIES + 1) > LONGEST:
            return best
        size *= 2


@torch.no_grad()
def _shortest_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """The seconds of the fastest product of matrices [size, size]."""
    # Of many values: a GPU that multiplies equal ones switches fewer bits, and clocks higher.
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
