"""Seeds as pure functions of the position, kernels that give the same result every time, and how
exact products are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt_core.modeling.init import seed_of
from apt_core.torch_state import fp32_precision, set_fp32_precision

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

        self._newest = 0

    def seed(self, step: int, micro: int) -> None:
        # Multiplied and folded by odd constants, for a generator may look at the low half alone.
        mixed = self._start + step * 0x9E3779B97F4A7C15 + micro * 0xC2B2AE3D27D4EB4F & _64_BITS
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _64_BITS
        self._newest = (mixed ^ mixed >> 32) >> 1
        self._manual_seed(self._newest)

    def again(self) -> None:
        """Seed it for the same micro-batch once more."""
        self._manual_seed(self._newest)


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


@contextmanager
def fp32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Let a GPU multiply matrices of fp32 in TF32 inside, or exactly where ``tf32`` is False.

    TF32 has 10 bits of mantissa of fp32's 23. A device that is no GPU multiplies as before.
    """
    if device.type != "cuda":
        yield
        return
    before = fp32_precision()
    # By the old name: torch raises where it is asked for that after a setting by the new ones.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        set_fp32_precision(before)
