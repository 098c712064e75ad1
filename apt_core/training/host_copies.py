"""Copies a run's tensors into host memory, from which a checkpoint is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from apt_core.device import available_memory
from apt_core.error_text import one_line
from apt_core.log import get_logger
from apt_core.parallel.world import local_part

log = get_logger("apt.checkpoint")

BLOCK_BYTES = 2**28
"""Size of the blocks in which pinned memory is allocated; a larger tensor gets a larger block."""

PINNED_SHARE = 4
"""At most 1/PINNED_SHARE of the host's available memory is pinned, since pinned memory cannot be
paged out for others."""

ALIGNMENT = 64

CPU = torch.device("cpu")

Tensors = Mapping[str, Tensor]


@dataclass
class _Block:
    memory: Tensor
    used: int = 0

    def take(self, size: int) -> Tensor:
        start = self.used
        self.used += _aligned(size)
        return self.memory[start : start + size]


class HostCopies:
    """Copies on the CPU that share nothing with the tensors.

    Tensors of a GPU are copied into pinned memory asynchronously, with one wait for all of them.
    The memory is reused by the next call of :meth:`of`, so the copies last until then; the limit on
    it is divided among the ``processes`` on this machine. The copy of a sharded tensor is sharded
    alike, over ``mesh``, a mesh of CPUs.
    """

    def __init__(self, mesh: DeviceMesh | None = None, processes: int = 1) -> None:
        self._mesh, self._processes = mesh, processes
        self._blocks: list[_Block] = []
        self._limit: int | None = None
        self._left = 0

    def of(self, groups: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
        """Contiguous copies of all groups, under the same names."""
        parts = [local_part(t.detach()) for group in groups.values() for t in group.values()]
        sent = [part for part in parts if is_sent(part)]
        for block in self._blocks:
            block.used = 0
        self._left = sum(_aligned(part.nbytes) for part in sent)
        copies = {
            name: {key: self._copy(tensor.detach()) for key, tensor in group.items()}
            for name, group in groups.items()
        }
        for device in {part.device for part in sent}:
            wait_for(device)
        return copies

    def _copy(self, tensor: Tensor) -> Tensor:
        part = local_part(tensor)
        if is_sent(part):
            copy = self._room(part).copy_(part, non_blocking=True)
        else:
            copy = part.to("cpu", copy=True).contiguous()
        if not isinstance(tensor, DTensor):
            return copy
        return DTensor.from_local(
            copy,
            self._mesh or tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _room(self, like: Tensor) -> Tensor:
        """Memory for a copy of ``like``: pinned, or ordinary where the limit is reached."""
        size = _aligned(like.nbytes)
        fitting = (block for block in self._blocks if block.used + size <= len(block.memory))
        block = next(fitting, None) or self._pin(size)
        self._left -= size
        if block is None:
            return torch.empty(like.shape, dtype=like.dtype)
        return block.take(like.nbytes).view(like.dtype).view(like.shape)

    def _pin(self, size: int) -> _Block | None:
        """A new block with room for ``size`` bytes and for tensors that are still to be copied."""
        if self._limit is None:
            self._limit = available_memory(CPU) // PINNED_SHARE // self._processes
        # torch rounds pinned allocations up to a power of two.
        wanted = 1 << (max(size, min(self._left, BLOCK_BYTES)) - 1).bit_length()
        if sum(len(block.memory) for block in self._blocks) + wanted > self._limit:
            return None
        try:
            self._blocks.append(_Block(pinned(wanted)))
        except RuntimeError as error:
            self._limit = 0
            log.info("no more memory can be pinned for checkpoints: %s", one_line(error))
            return None
        return self._blocks[-1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_sent(part: Tensor) -> bool:
    """Whether ``part`` is copied to the host asynchronously."""
    return part.is_cuda


def pinned(size: int) -> Tensor:
    """Allocate ``size`` bytes of pinned memory. Raises RuntimeError."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def wait_for(device: torch.device) -> None:
    """Wait until ``device`` has done all its work."""
    torch.cuda.current_stream(device).synchronize()
