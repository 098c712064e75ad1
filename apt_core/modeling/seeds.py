"""Sets what makes computation reproducible: seeds by position, deterministic kernels and TF32."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt_core.errors import ConfigError
from apt_core.modeling.init import seed_of
from apt_core.torch_state import fp32_precision, set_fp32_precision

_64_BITS = 2**64 - 1


class ModelSeeds:
    """Seeds the generator of the model's dropout, and no other, for each micro-batch by (seed,
    step, micro-batch, rank)."""

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
        # Mixed by odd constants, since a generator may use the low half of the seed only.
        mixed = self._start + step * 0x9E3779B97F4A7C15 + micro * 0xC2B2AE3D27D4EB4F & _64_BITS
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _64_BITS
        self._newest = (mixed ^ mixed >> 32) >> 1
        self._manual_seed(self._newest)

    def again(self) -> None:
        """Seed it for the same micro-batch again."""
        self._manual_seed(self._newest)


_LOCK = threading.Lock()
_wanting: list[tuple[int, bool]] = []
"""The thread and the value of every :func:`deterministic_kernels` that lasts."""
_found: list[tuple[bool, bool]] = []
"""The setting of torch before the first of them, which the last one restores: runs in turns do not
end in the order in which they began."""


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """If ``wanted``, use only deterministic kernels while the context lasts; torch raises an error
    for an operator without one.

    The CPU kernels of the core's layers are always deterministic. Raises ConfigError where another
    thread is in this context with the other value: torch has one setting for all threads.
    """
    own = threading.get_ident(), wanted
    with _LOCK:
        if any(thread != own[0] and other != wanted for thread, other in _wanting):
            raise ConfigError(
                "differs from that of a run in another thread of this process, and torch has "
                "one setting for all threads",
                key="training.deterministic",
                hint="set it alike in both runs, or let one follow the other",
            )
        if not _wanting:
            _found[:] = [_kernels()]
        _wanting.append(own)
        _set_kernels()
    try:
        yield
    finally:
        with _LOCK:
            _wanting.remove(own)
            _set_kernels()


def _kernels() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def _set_kernels() -> None:
    wanted = bool(_wanting) and _wanting[-1][1]
    if wanted:
        # cuBLAS requires it, and reads it when its first handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kernels = (True, False) if wanted else _found[0]
    if kernels != _kernels():
        torch.use_deterministic_algorithms(kernels[0])
        torch.backends.cudnn.benchmark = kernels[1]


@contextmanager
def fp32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """While the context lasts, multiply fp32 matrices on a GPU in TF32, or in fp32 without
    ``tf32``.

    TF32 has 10 bits of mantissa of fp32's 23. A device that is no GPU multiplies as before.
    """
    if device.type != "cuda":
        yield
        return
    before = fp32_precision()
    # Set by the old name: torch raises an error if code reads it after a setting by the new names.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        set_fp32_precision(before)
