"""Seeds as pure functions of the position, and kernels that give the same result every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt_core.modeling.init import seed_of


def seed_model_generator(device: torch.device, seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the generator that the model's dropout draws from, and no other, for a micro-batch."""
    seed = seed_of(seed, f"step/{step}/{micro}/{rank}")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


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
