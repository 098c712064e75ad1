"""Seeds as pure functions of the position, and kernels that give the same result every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt_core.modeling.init import seed_of

_64_BITS = 2**64 - 1


class ModelSeeds:
    """Seeds the generator that the model's dropout draws from, and no other, for a micro-batch: a
    function of (seed, step, micro-batch, rank)."""

    def __init__(self, device: torch.device, seed: int, rank: int) -> None:
        self._start = seed_of(seed, f"model/{rank}")
        if device.type == "cuda":
            self._manual_seed = torch.cuda.default_generators[device.index].manual_seed
        elif device.type == "mps":
            self._manual_seed = torch.mps.manual_seed
        else:
            self._manual_seed = torch.default_generator.manual_seed

    def seed(self, step: int, micro: int) -> None:
        # Multiplied and folded by odd constants, for a generator may look at the low half alone.
        mixed = self._start + step * 0x9E3779B97F4A7C15 + micro * 0xC2B2AE3D27D4EB4F & _64_BITS
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _64_BITS
        self._manual_seed((mixed ^ mixed >> 32) >> 1)


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic kernels only inside, if ``wanted``; it raises where it has none.

    The CPU kernels of the core's layers are deterministic as they are.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # What cuBLAS asks for; read when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
