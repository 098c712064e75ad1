"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apt_core.training.distributed import local_part

WARMUP = 10
"""The average begins short, as long as there is little to average: its decay is at most
(1 + step) / (WARMUP + step)."""


class WeightAverage:
    """``values`` [name] follow the parameters of ``model`` with ``decay`` a step.

    Parameters that are sharded are averaged where they lie.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        parameters = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self._live = [local_part(p.detach()) for p in parameters.values()]
        self._averages = [local_part(value) for value in self.values.values()]
        self._exchanged, self._exchanging = 0, False

    @torch.no_grad()
    def update(self, step: int, void: bool | Tensor = False) -> None:
        """Take the weights after ``step`` in, unless the step was ``void``, of which the device may
        know alone (0-d, 1.0 or 0.0)."""
        share = 1 - min(self.decay, (1 + step) / (WARMUP + step))
        if isinstance(void, Tensor):
            ahead = torch._foreach_sub(self._live, self._averages)
            torch._foreach_mul_(ahead, share * (1 - void))
            torch._foreach_add_(self._averages, ahead)
        elif not void:
            torch._foreach_lerp_(self._averages, self._live, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights inside, and its own again after."""
        try:
            while self._exchanged < len(self._live):
                self._exchange(self._exchanged)
                self._exchanged += 1
            yield
        finally:
            while self._exchanged:
                self._exchange(self._exchanged - 1)
                self._exchanged -= 1

    @property
    def is_apart(self) -> bool:
        """Are the weights and their averages where they belong? Not inside :meth:`in_place`, nor
        after an exchange that was interrupted."""
        return not self._exchanged and not self._exchanging

    @torch.no_grad()
    def _exchange(self, index: int) -> None:
        live, average = self._live[index], self._averages[index]
        kept = live.clone()  # may run out of memory, and has changed nothing then
        self._exchanging = True
        live.copy_(average)
        average.copy_(kept)
        self._exchanging = False
