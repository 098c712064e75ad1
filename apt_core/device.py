"""Which device and which precision a run uses, and why. torch is imported when asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resolve_device(asked: str) -> tuple[torch.device, str]:
    """The device for ``hardware.device`` (auto, cpu, cuda, cuda:N, mps), and why it is another.

    The reason is empty when the device is what was asked for. ``auto`` takes an accelerator where
    there is one.
    """
    import torch

    usable = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if asked == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if usable[name])), ""
    kind, _, index = asked.partition(":")
    if usable[kind] and (not index or int(index) < torch.cuda.device_count()):
        return torch.device(asked), ""
    return torch.device("cpu"), f"this machine or this build of torch has no {asked} device"


def autocast_dtype(mixed_precision: bool | str, device: torch.device) -> torch.dtype | None:
    """The autocast type for ``training.mixed_precision``, or None for plain fp32.

    ``auto`` uses bf16 where the hardware computes faster in it: on CUDA with native bf16. On a
    CPU without bf16 units it makes a step slower, so there ``auto`` is fp32.
    """
    import torch

    if mixed_precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    return torch.bfloat16 if mixed_precision else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A context for the forward pass in ``dtype``; None is fp32."""
    import torch

    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: by tensors on a GPU, by the whole process on a CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads inside; None leaves its own choice."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
